"""What happened in the test games, step by step, of the policies that a reader compares: for the report's viewer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import polars as pl
from pydantic import JsonValue

from dmr_pipeline.environments.base import Task
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.tables import EPISODES, STEPS, to_frames
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.router.labels import measure

SHOWN = ("single", "router", "oracle")
"""Kinds of the policies whose steps are kept: the dearest and the cheapest routed rung alone, the routers, and what would be
best."""
KEPT = pl.Schema(
    {**STEPS, **{name: EPISODES[name] for name in ("task_id", "task_type", "policy", "opening", "success")}}
)
"""A row a step, as in `rollout.tables.STEPS`, with what its episode is repeated."""
TRANSCRIPTS = pl.Schema(
    {
        "policy": pl.String(),
        **{name: STEPS[name] for name in ("turn", "command", "observation", "precision", "exceedance")},
    }
    | {"task_id": pl.String()}
)
"""A row a step of the first draw: `observation` is what the command showed; `exceedance` is `Decision`'s, rounded."""
OPENINGS = pl.Schema(
    {"task_id": pl.String(), "task_type": pl.String(), "instruction": pl.String(), "opening": pl.String()}
)
"""A row a game: its task, and the first observation."""
CHOICES = pl.Schema(
    {
        "policy": pl.String(),
        "task_id": pl.String(),
        "turn": pl.Int64(),
        "precision": pl.String(),
        "command": pl.String(),
        "margin": pl.Float64(),
        "kl_high_low": pl.Float64(),
    }
)
"""A row a step and routed rung: the greedy command that it would give there, the least lead of its tokens, and how far it is
from the dearest rung, in nats, summed as the recipe's labels are; of that one null."""

_DIGITS = 4


def kept_rows(played: Sequence[Trajectory], policy: str) -> pl.DataFrame:
    """Rows of `KEPT`."""
    episodes, steps = to_frames(played, policy)
    told = episodes.select("episode_id", "task_id", "task_type", "policy", "opening", "success")
    return steps.join(told, on="episode_id", maintain_order="left").select(KEPT.names())


def transcripts(shown: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Rows of `TRANSCRIPTS`, of a table of `KEPT` for each policy, in the order of their names."""
    rounded = pl.col("exceedance").list.eval(pl.element().round(_DIGITS))
    return pl.concat(shown[name] for name in sorted(shown)).with_columns(rounded).select(TRANSCRIPTS.names())


def openings(shown: pl.DataFrame, games: Sequence[Task]) -> pl.DataFrame:
    """Rows of `OPENINGS`, of a table of `KEPT`."""
    tasks = pl.DataFrame(
        [(game.task_id, game.instruction) for game in games], schema=["task_id", "instruction"], orient="row"
    )
    first = shown.filter(turn=0).select("task_id", "task_type", "opening")
    return tasks.join(first, on="task_id", maintain_order="left").select(OPENINGS.names())


def choices(
    rollouts: Rollouts,
    shown: pl.DataFrame,
    counted: Literal["action", "command"],
    kept: KeptTables,
    on_progress: Callable[[int], None],
) -> pl.DataFrame:
    """Rows of `CHOICES` for a policy's episodes: each rung reads what it has read there, and says what it would do. That is no
    more than reading: nothing is played.

    Args:
        shown: a table of `KEPT`.
        counted: as in `labels.measure`.
        kept: under all that the episodes depend on.
    """
    columns: list[JsonValue] = [*CHOICES.names()]
    facts: dict[str, JsonValue] = {"choices": columns, "counted": counted}
    found = kept.read(**facts)
    if found is None:
        episodes = shown.unique("episode_id", maintain_order=True)
        divergences, drafts = measure(rollouts, episodes, shown.select(STEPS.names()), counted, on_progress)
        command = rollouts.prompter.command
        place = ["episode_id", "turn", "precision"]
        found = (
            drafts.with_columns(
                command=pl.Series([command(action) for action in drafts["action"].to_list()], dtype=pl.String)
            )
            .join(divergences.select(*place, "kl_high_low"), on=place, how="left", maintain_order="left")
            .join(episodes.select("episode_id", "policy", "task_id"), on="episode_id", maintain_order="left")
            .with_columns(pl.col("margin", "kl_high_low").round(_DIGITS))
            .select(CHOICES.names())
        )
        kept.write(found, **facts)
    return found
