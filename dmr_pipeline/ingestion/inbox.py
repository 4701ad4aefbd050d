"""Episodes that an agent logged at work, dropped as files into `data/incoming/<recipe>/`.

A file is known by its content (sha256), never by its name or time, and is taken in whole or not at all. It moves once: a bad
one into `quarantine/`, the reasons beside it; a good one into `ingested/`, after the artefact that holds it was published. So a
kill at any moment loses no file, and no content is taken in twice. What cannot be moved stops nothing: `dmr status` names it.

The artefact is `episodes/<sha256 of the dropped file>.parquet`, one row an episode, and `left_out.json`: episodes that the
recipe no longer allows, since it has changed, and why. They stay in the artefact, but nothing reads them.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from dmr_pipeline.artifacts.folders import artifact_folder, incoming_folder
from dmr_pipeline.artifacts.run_record import run_record_beside
from dmr_pipeline.environments.task_ids import KnownGames
from dmr_pipeline.environments.task_types import task_types
from dmr_pipeline.errors import FULL, UserError, printable
from dmr_pipeline.ingestion.incoming import (
    FILE_LIMIT,
    INGESTED_FOLDER,
    QUARANTINE_FOLDER,
    Dropped,
    look,
    make_way,
    move,
    quarantine,
    read,
)
from dmr_pipeline.ingestion.rows import json_lines, json_value, parquet_rows
from dmr_pipeline.recipe import Recipe, Splits

log = logging.getLogger(__name__)

STAGE = "ingested_trajectories"
EPISODES_FOLDER = "episodes"
LEFT_OUT_FILE = "left_out.json"
NOT_MOVED = "not_moved"
"""In the run's record: sha256 of a refused file that could not be moved -> why, and why it was refused."""

EXAMPLE: dict[str, JsonValue] = {
    "episode_id": "kitchen-robot-2026-11-24-0001",
    "task_id": "kitchen/17",
    "task_type": "pick_and_place_simple",
    "task": "put some apple on sidetable.",
    "observation": "You are in the middle of a room. Looking quickly around you, you see a fridge 1, and a sidetable 1.",
    "steps": [
        {
            "command": "go to fridge 1",
            "thought": "find apple",
            "observation": "You arrive at fridge 1. The fridge 1 is closed.",
            "precision": "float",
        },
        {
            "command": "open fridge 1",
            "observation": "You open the fridge 1. In it, you see nothing.",
            "precision": "int2",
        },
    ],
    "success": False,
}

Name = Annotated[str, Field(min_length=1, pattern=r"^\S(.*\S)?$")]
"""One line without white space around it."""


def _left_out_as_empty(text: object) -> object:
    return "" if text is None else text


class LoggedStep(BaseModel):
    """One step of a logged episode. Texts are kept as they are, of whatever length: an episode whose transcript the agent has no
    room for is not trained on, and the stages that leave it out say so."""

    model_config = ConfigDict(extra="forbid", strict=True)

    command: str = Field(
        description="what the agent did, as the environment was given it: empty where the agent wrote nothing, of several lines"
        " where it wrote several"
    )
    thought: Annotated[str, BeforeValidator(_left_out_as_empty, json_schema_input_type=str | None)] = Field(
        "",
        description="what the agent thought before the command, if it is one that thinks; null is the same as left out",
    )
    observation: str = Field(description="what the command showed")
    precision: Name = Field(description="rung of the recipe's precision ladder that acted, such as float or int2")
    probability: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="with which the policy at work chose the ladder's high rung at this step, whatever it then drew; left out"
        " where it is not known",
    )


class LoggedEpisode(BaseModel):
    """One logged episode: a line of NAME.jsonl (UTF-8; no key twice in an object), or a row of NAME.parquet, whose `steps` are a
    list of structs. A null in Parquet is a field that was left out. A file holds at most 64 MiB, also once it is unpacked."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE]})

    episode_id: Name = Field(description="unique over all files that were ever ingested for the recipe")
    task_id: Name = Field(
        description="the game or goal, named as the benchmark names it or by its file's path, URL or session; none of a held-out"
        " split. One that the recipe has not drawn is taken in, with a warning"
    )
    task_type: Name = Field(
        description="the benchmark's kind of task: in ALFWorld such as pick_and_place_simple, in WebShop the category"
    )
    task: Name = Field(description="the instruction sentence")
    observation: str = Field(pattern=r"\S", description="the first observation, without the instruction")
    steps: list[LoggedStep] = Field(min_length=1, description="in order; at most benchmark.step_limit of the recipe")
    success: bool = Field(description="whether the task was solved")
    reward: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="1 where the task was solved, else less; success by default"
    )

    @model_validator(mode="after")
    def _reward_of_success(self) -> Self:
        if self.reward is not None and self.success != (self.reward >= 1):
            raise ValueError(f"success is {self.success}, but the reward is {self.reward}; 1 means success")
        return self


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
        """Args: benchmark_tasks: that stage's folder; without it no game is known to be held out but by its split's name."""
        return cls(
            task_types(recipe.benchmark),
            tuple(rung.name for rung in recipe.precisions.ladder),
            recipe.benchmark.step_limit,
            KnownGames(recipe.benchmark.environment, {} if benchmark_tasks is None else _games(benchmark_tasks)),
        )

    def objections(self, episode: LoggedEpisode) -> Iterator[str]:
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


def dropped_files(incoming: Path) -> list[Dropped]:
    make_way(incoming)
    dropped, left = look(incoming)
    for reason in left:
        log.warning("%s", reason)
    return dropped


def read_dropped(file: Dropped, rules: Rules, earlier: Collection[str]) -> tuple[list[LoggedEpisode], list[str]]:
    """As `read_episodes`; nothing of either where the file is gone, or is being written."""
    if file.refusal is not None:
        return [], [f"{file.path.name}: {file.refusal}"]
    try:
        content = read(file.path)
    except FileNotFoundError:
        return [], []
    except UserError as error:
        log.warning("%s: %s", printable(file.path), error)
        return [], []
    if hashlib.sha256(content).hexdigest() != file.digest:
        log.warning("%s is being written: left for the next time", printable(file.path))
        return [], []
    return read_episodes(file.path, content, rules, earlier)


def put_in_quarantine(file: Dropped, problems: Sequence[str]) -> str | None:
    """Why the file cannot be moved, in a few words; None where it was.

    Raises:
        OSError: the disk is full.
    """
    try:
        reasons = quarantine(file, problems)
    except OSError as error:
        if error.errno in FULL:
            raise
        trouble = f"it cannot be moved into {QUARANTINE_FOLDER}/ ({error.strerror or printable(error)})"
        log.warning("%s: %s; it was refused: %s", printable(file.path), trouble, shortened(problems))
        return trouble
    more = f" (and {len(problems) - 1} more, see {printable(reasons)})" if len(problems) > 1 else ""
    log.warning("%s: quarantined: %s%s", printable(file.path), printable(problems[0]), more)
    return None


def shortened(problems: Sequence[str]) -> str:
    return printable(problems[0]) + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def waiting_files(data_root: Path, recipe: str) -> Sequence[Path]:
    """Dropped files that are yet to be taken in or quarantined, sorted by name."""
    return [file.path for file in _waiting(data_root, recipe)]


def waiting_contents(data_root: Path, recipe: str) -> str | None:
    """sha256 over the waiting files' contents, whatever they are called; None where none is waiting."""
    digests = sorted(file.digest for file in _waiting(data_root, recipe))
    return hashlib.sha256("".join([recipe, *digests]).encode()).hexdigest() if digests else None


def _waiting(data_root: Path, recipe: str) -> list[Dropped]:
    settled = _held(data_root, recipe) | _not_moved(data_root, recipe).keys()
    dropped, _ = look(incoming_folder(recipe, data_root))
    return [file for file in dropped if file.digest not in settled]


def file_away(data_root: Path, recipe: str) -> None:
    """Move dropped files that the published artefact holds into `ingested/`. Any number of processes may do so at once."""
    held = _held(data_root, recipe)
    dropped, _ = look(incoming_folder(recipe, data_root))
    for file in dropped:
        if file.digest in held:
            try:
                move(file, file.path.parent / INGESTED_FOLDER)
            except OSError as error:
                log.warning("%s: it is ingested, but cannot be moved away (%s)", printable(file.path), error.strerror)


def lying_files(data_root: Path, recipe: str) -> list[str]:
    """What lies in the recipe's folder and waits for nothing: what it is, and what to do, in a line each."""
    dropped, left = look(incoming_folder(recipe, data_root))
    held, not_moved = _held(data_root, recipe), _not_moved(data_root, recipe)
    again = f"or give this user the right to and run `dmr materialize {STAGE} --recipe {recipe} --force`"
    for file in dropped:
        if file.digest in held:
            left.append(f"{printable(file.path)}: it is ingested; `dmr run {recipe}` moves it into {INGESTED_FOLDER}/")
        elif file.digest in not_moved:
            left.append(f"{printable(file.path)}: {not_moved[file.digest]}; move it away, {again}")
    return left


def misplaced_files(data_root: Path, recipes: Sequence[str]) -> list[Path]:
    """Files under `data/incoming/` that no recipe will ever ingest, sorted: not directly in the folder of one."""
    root = incoming_folder("", data_root)
    return sorted(
        path
        for folder, _, names in os.walk(root)
        for path in (Path(folder, name) for name in names)
        if not path.name.startswith(".")
        and path.suffix != ".part"
        and not _has_its_place(path.relative_to(root).parts, recipes)
    )


def misplaced_lines(data_root: Path, recipes: Sequence[str]) -> list[str]:
    """What `misplaced_files` are, and what to do, in a line each."""
    right = incoming_folder("<recipe>", data_root)
    return [
        f"{printable(path)} is in no recipe's folder: move it to {right}/"
        for path in misplaced_files(data_root, recipes)
    ]


def read_ingested(folder: Path) -> list[LoggedEpisode]:
    """The artefact's episodes but those left out, checked again, in the order of their files' hashes.

    Raises:
        UserError: an episode does not follow the schema, or its id is there twice.
    """
    left_out = json.loads((folder / LEFT_OUT_FILE).read_text(encoding="utf-8"))
    return [episode for episode in read_stored(folder) if episode.episode_id not in left_out]


def stored_ids(folder: Path) -> set[str]:
    """Ids of all episodes that the artefact holds, those left out too."""
    return {episode.episode_id for episode in read_stored(folder)}


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
        found = list(rules.objections(episode))
        if episode.episode_id in episodes:
            found.append("its id is in this file twice")
        elif episode.episode_id in earlier:
            found.append("an earlier file has brought an episode of this id")
        problems += [f"{path.name}: {place}: episode {episode.episode_id!r}: {problem}" for problem in found]
        episodes[episode.episode_id] = episode
    return list(episodes.values()), problems


class NoEpisode(Exception):
    """What is wrong with a row, a line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


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


def parse_episode(row: Any) -> LoggedEpisode:  # noqa: ANN401 - a line of JSON, or what a row of Parquet holds
    """Raises: NoEpisode: which one, and all that is wrong with it."""
    try:
        value = json_value(row) if isinstance(row, bytes) else row
    except UserError as error:
        raise NoEpisode([str(error)]) from error
    try:
        return LoggedEpisode.model_validate(value)
    except ValidationError as error:
        named = f"episode {value['episode_id']!r}: " if isinstance(value, dict) and value.get("episode_id") else ""
        raise NoEpisode([f"{named}{_described(found)}" for found in error.errors(include_url=False)]) from error


def _described(found: Mapping[str, Any]) -> str:
    """Args: found: one of `ValidationError.errors()`."""
    field = f"{'.'.join(map(str, found['loc']))}: " if found["loc"] else ""
    return f"{field}{' '.join(found['msg'].split())}"


def store_episodes(episodes: Sequence[LoggedEpisode], path: Path) -> None:
    """One row an episode. Equal episodes give equal bytes. Where no step has a probability, there is no column of them."""
    import pyarrow as pa
    import pyarrow.parquet

    text = pa.string()
    known = any(step.probability is not None for episode in episodes for step in episode.steps)
    step = pa.struct(
        [
            (name, pa.float64() if name == "probability" else text)
            for name in LoggedStep.model_fields
            if known or name != "probability"
        ]
    )
    others = {"steps": pa.list_(step), "success": pa.bool_(), "reward": pa.float64()}
    schema = pa.schema([(name, others.get(name, text)) for name in LoggedEpisode.model_fields])
    table = pa.Table.from_pylist([episode.model_dump() for episode in episodes], schema=schema)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def read_stored(artefact: Path) -> list[LoggedEpisode]:
    """Raises: UserError: an episode does not follow the schema, or its id is there twice."""
    remedy = f"get it back with `dmr restore {STAGE} --recipe {artefact.parent.name}`"
    episodes: dict[str, LoggedEpisode] = {}
    for path in stored_files(artefact):
        for row in parquet_rows(path.read_bytes(), limit=None):
            try:
                episode = parse_episode(row)
            except NoEpisode as error:
                raise UserError(f"{path}: {error}; {remedy}") from error
            if episode.episode_id in episodes:
                raise UserError(f"{path}: episode {episode.episode_id!r} is in another file too; {remedy}")
            episodes[episode.episode_id] = episode
    return list(episodes.values())


def stored_files(artefact: Path) -> list[Path]:
    return sorted((artefact / EPISODES_FOLDER).glob("*.parquet"))


def _held(data_root: Path, recipe: str) -> set[str]:
    """sha256 of every dropped file that the published artefact holds."""
    return {path.stem for path in stored_files(artifact_folder(STAGE, recipe, data_root))}


def _not_moved(data_root: Path, recipe: str) -> dict[str, str]:
    """What the record of the run that made the artefact says of refused files that still lie where they were dropped."""
    try:
        record = run_record_beside(artifact_folder(STAGE, recipe, data_root))
    except OSError:
        return {}
    found = None if record is None else record.measured.get(NOT_MOVED)
    return {digest: str(why) for digest, why in found.items()} if isinstance(found, dict) else {}


def _games(benchmark_tasks: Path) -> dict[str, str]:
    """Task id -> split."""
    import pyarrow.parquet

    tables = {
        split: pyarrow.parquet.read_table(benchmark_tasks / f"{split}.parquet", columns=["task_id"])
        for split in Splits.model_fields
    }
    return {task_id: split for split, table in tables.items() for task_id in table["task_id"].to_pylist()}


def _has_its_place(parts: tuple[str, ...], recipes: Sequence[str]) -> bool:
    """Args: parts: of a file's path under `data/incoming/`."""
    filed = (INGESTED_FOLDER, QUARANTINE_FOLDER)
    return parts[0] in recipes and (len(parts) == 2 or (len(parts) == 3 and parts[1] in filed))
