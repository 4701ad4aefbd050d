"""What a recipe asks of logged episodes, and a dropped file held to it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.environments.task_ids import KnownGames
from dmr_pipeline.errors import UserError, printable
from dmr_pipeline.ingestion.incoming import FILE_LIMIT
from dmr_pipeline.ingestion.rows import json_lines, parquet_rows
from dmr_pipeline.ingestion.schema import LoggedEpisode, NoEpisode, parse_episode
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.benchmark import Splits


@dataclass(frozen=True)
class Rules:
    """What a recipe asks of an episode."""

    task_types: tuple[str, ...]
    """The benchmark's."""
    precisions: tuple[str, ...]
    """Names of the ladder's rungs."""
    step_limit: int
    games: KnownGames

    @classmethod
    def of(cls, recipe: Recipe, benchmark_tasks: Path | None) -> "Rules":
        """The rules of a recipe.

        Args:
            benchmark_tasks: that stage's folder; without it no game is known to be held out but by its split's name.
        """
        benchmark = benchmark_of(recipe.benchmark)
        return cls(
            benchmark.task_types,
            tuple(rung.name for rung in recipe.precisions.ladder),
            recipe.benchmark.step_limit,
            KnownGames(type(benchmark), {} if benchmark_tasks is None else _games(benchmark_tasks)),
        )

    def violations(self, episode: LoggedEpisode) -> Iterator[str]:
        """Why the episode must not be trained on; none where it may."""
        if (held_out := self.games.held_out(episode.task_id)) is not None:
            yield f"{held_out}: trained on, it would falsify the report"
        if episode.task_type not in self.task_types:
            known = ", ".join(self.task_types)
            yield f"task_type: {episode.task_type!r} is none of the benchmark's ({known})"
        if len(episode.steps) > self.step_limit:
            yield f"{len(episode.steps)} steps, but benchmark.step_limit of the recipe is {self.step_limit}"
        for turn, step in enumerate(episode.steps):
            if step.precision not in self.precisions:
                known = ", ".join(self.precisions)
                yield f"steps.{turn}.precision: {step.precision!r} is not on the recipe's ladder ({known})"

    def strangers(self, episodes: Sequence[LoggedEpisode]) -> str | None:
        """A warning of episodes whose games are none of the recipe's; None where there are none."""
        unknown = [episode.task_id for episode in episodes if not self.games.is_known(episode.task_id)]
        if not unknown:
            return None
        named = f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        return (
            f"{len(unknown)} of {len(episodes)} episodes are of games that the recipe's splits do not hold"
            f" ({printable(named)}): that none of them is held out is not known"
        )


def read_episodes(
    path: Path, content: bytes, rules: Rules, earlier: Collection[str]
) -> tuple[list[LoggedEpisode], list[str]]:
    """The episodes in a file, and everything that is wrong with it: where, which episode, and what.

    Args:
        path: its suffix tells the format.
        earlier: ids of episodes that other files have brought.
    """
    try:
        rows = _rows(path.suffix, content)
    except UserError as error:
        return [], [f"{path.name}: {error}"]
    episodes: dict[str, LoggedEpisode] = {}
    problems = [] if rows else [f"{path.name}: it holds no episodes"]
    for place, row in rows:
        try:
            episode = parse_episode(row)
        except NoEpisode as error:
            problems += [f"{path.name}: {place}: {problem}" for problem in error.problems]
            continue
        found = list(rules.violations(episode))
        if episode.episode_id in episodes:
            found.append("its id is in this file twice")
        elif episode.episode_id in earlier:
            found.append("an earlier file has brought an episode of this id")
        problems += [f"{path.name}: {place}: episode {episode.episode_id!r}: {problem}" for problem in found]
        episodes[episode.episode_id] = episode
    return list(episodes.values()), problems


def _rows(suffix: str, content: bytes) -> Sequence[tuple[str, Any]]:
    """Each row and its place in the file: a line of JSON, or what a row of Parquet holds.

    Raises:
        UserError: it is neither JSONL nor Parquet.
    """
    if suffix == ".jsonl":
        return json_lines(content)
    if suffix == ".parquet":
        return [(f"row {n}", row) for n, row in enumerate(parquet_rows(content, FILE_LIMIT), start=1)]
    raise UserError("use .jsonl or .parquet")


def _games(benchmark_tasks: Path) -> dict[str, str]:
    """Task id -> split."""
    import pyarrow.parquet

    tables = {
        split: pyarrow.parquet.read_table(benchmark_tasks / f"{split}.parquet", columns=["task_id"])
        for split in Splits.model_fields
    }
    return {task_id: split for split, table in tables.items() for task_id in table["task_id"].to_pylist()}
