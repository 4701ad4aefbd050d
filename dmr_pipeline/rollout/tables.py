"""Played episodes as tables: a row an episode, and a row a step."""

import logging
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.trajectory import Trajectory

log = logging.getLogger(__name__)


STEPS = pl.Schema(
    {
        "episode_id": pl.String(),
        "turn": pl.Int64(),
        "command": pl.String(),
        "observation": pl.String(),
        "precision": pl.String(),
        "exceedance": pl.List(pl.Float64),
        "segment": pl.List(pl.Int64),
        "action": pl.List(pl.Int64),
        "tokens_read": pl.Int64(),
    }
)
"""One row a step. `segment` and `action` are token ids; `observation` is what the command showed; `tokens_read` counts the
tokens that the acting precision's forward passes read; `precision` is the rung that acted; `exceedance` is `Decision`'s."""

EPISODES = pl.Schema(
    {
        "episode_id": pl.String(),
        "task_id": pl.String(),
        "task_type": pl.String(),
        "policy": pl.String(),
        "member": pl.Int64(),
        "opening": pl.String(),
        "success": pl.Boolean(),
        "reward": pl.Float64(),
        "steps": pl.Int64(),
    }
)
"""One row an episode. `opening` is the first observation."""


def to_frames(played: Sequence[Trajectory], policy: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Episodes and steps as tables of the schemas above."""
    episodes, steps = [], []
    for trajectory in played:
        task = trajectory.run.task
        episode_id = f"{policy}/{task.task_id}/{trajectory.run.member}"
        episodes.append(
            (
                episode_id,
                task.task_id,
                task.task_type,
                policy,
                trajectory.run.member,
                trajectory.opening,
                trajectory.success,
                trajectory.reward,
                len(trajectory.steps),
            )
        )
        steps += [
            (
                episode_id,
                turn,
                s.command,
                s.observation,
                s.precision,
                s.exceedance,
                s.segment,
                s.action,
                s.reading.tokens,
            )
            for turn, s in enumerate(trajectory.steps)
        ]
    return pl.DataFrame(episodes, schema=EPISODES, orient="row"), pl.DataFrame(steps, schema=STEPS, orient="row")


def read_trajectories(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Episodes and steps, checked again on reading.

    Raises:
        UserError: a table has other columns than it should, missing values, or rows that are not unique.
    """
    tables = []
    for name, schema, key in (("episodes", EPISODES, ["episode_id"]), ("steps", STEPS, ["episode_id", "turn"])):
        path = folder / f"{name}.parquet"
        table = pl.read_parquet(path)
        if table.schema != schema:
            raise UserError(f"{path}: its columns are {dict(table.schema)}, expected {dict(schema)}; make it anew")
        if sum(table.null_count().row(0)) or table.select(key).is_duplicated().any():
            raise UserError(f"{path}: missing values or repeated {key}; make it anew")
        tables.append(table)
    return tables[0], tables[1]
