"""Stage `trajectories`: episodes on the router_train games by the behaviour policies that the recipe names.

And the union of these with the ingested ones, which all training reads.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl
import torch
from rich.progress import Progress

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.tasks import read_tasks
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.inbox import LoggedEpisode, read_ingested
from dmr_pipeline.precision.ladder import Ladder, PolicyRuns
from dmr_pipeline.rollout.engine import Clock, RoutingPolicy, Run, SinglePrecision, Trajectory
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.prompts import Moment, Prompter
from dmr_pipeline.router.baselines import RandomMixing

log = logging.getLogger(__name__)

INGESTED = "ingested"
"""Policy of the episodes that an agent logged at work."""

STEPS = pl.Schema(
    {
        "episode_id": pl.String(),
        "turn": pl.Int64(),
        "command": pl.String(),
        "observation": pl.String(),
        "high": pl.Boolean(),
        "probability": pl.Float64(),
        "segment": pl.List(pl.Int64),
        "action": pl.List(pl.Int64),
        "processed": pl.Int64(),
    }
)
"""One row a step. `segment` and `action` are token ids; `observation` is what the command showed; `processed` counts the
tokens that the acting precision's forward passes read; `probability` is the policy's, of high precision."""

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
        "high_steps": pl.Int64(),
    }
)
"""One row an episode. `opening` is the first observation."""


@dataclass(frozen=True)
class AllTrajectories:
    """What is learned from: the played episodes, then the ingested ones."""

    episodes: pl.DataFrame
    steps: pl.DataFrame
    ingested_steps: int
    """Steps that were ingested, also those of episodes that are too long for the agent and in neither table."""


def trajectories(context: StageContext) -> StageResult:
    recipe = context.recipe
    torch.set_num_threads(recipe.runtime.threads)
    ladder = Ladder.load(context.inputs["quantized_checkpoints"], recipe)
    runs = [Run(game) for game in read_tasks(context.inputs["benchmark_tasks"], "router_train")]
    clock, frames, summary = Clock(), [], {}

    def on_played(index: int, played: list[Trajectory], spent: Clock) -> None:
        name = recipe.trajectories.behaviour[index].name
        clock.add(spent)
        frames.append(to_frames(played, name))
        summary[name] = {
            "episodes": len(played),
            "steps": sum(len(t.steps) for t in played),
            "success": round(sum(t.success for t in played) / len(played), 4),
        }
        if outgrown := sum(t.outgrown for t in played):
            summary[name]["outgrown"] = outgrown

    with Progress() as progress:
        plays = []
        for behaviour in recipe.trajectories.behaviour:
            bar = progress.add_task(f"episodes by {behaviour.name}", total=len(runs))
            policy = behaviour_policy(behaviour.high_ratio, recipe.trajectories.seed)
            plays.append(PolicyRuns(policy, runs, partial(progress.advance, bar)))
        known = Known()
        ladder.play_each(plays, recipe.trajectories.seed, on_played, known)
    episodes, steps = (pl.concat(parts) for parts in zip(*frames, strict=True))
    episodes.write_parquet(context.output / "episodes.parquet")
    steps.write_parquet(context.output / "steps.parquet")
    seconds = (clock.agent + clock.environment) / clock.steps
    measured = {"seconds_per_step": seconds, "share_of_actions_looked_up": known.share}
    return StageResult(summary=summary, measured=measured)


def behaviour_policy(high_ratio: float, seed: int) -> RoutingPolicy:
    if high_ratio in (0.0, 1.0):
        return SinglePrecision(high=high_ratio == 1.0)
    return RandomMixing(high_ratio, seed)


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
                sum(step.high for step in trajectory.steps),
            )
        )
        steps += [
            (episode_id, turn, s.command, s.observation, s.high, s.probability, s.segment, s.action, s.processed)
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


def read_all_trajectories(inputs: Mapping[str, Path], prompter: Prompter, high: str, capacity: int) -> AllTrajectories:
    """The union of the inputs `trajectories` and `ingested_trajectories`, both checked again on reading.

    Args:
        high: the high rung's name.
        capacity: tokens that a transcript may have.

    Raises:
        UserError: one of the artefacts is not what it should be.
    """
    episodes, steps = read_trajectories(inputs["trajectories"])
    logged = read_ingested(inputs["ingested_trajectories"])
    more_episodes, more_steps = ingested_tables(logged, prompter, high, capacity)
    return AllTrajectories(
        pl.concat([episodes, more_episodes], rechunk=True),
        pl.concat([steps, more_steps], rechunk=True),
        sum(len(episode.steps) for episode in logged),
    )


def ingested_tables(
    logged: Sequence[LoggedEpisode], prompter: Prompter, high: str, capacity: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Logged episodes as tables of the schemas above, tokenized as if the agent had played them.

    A step counts as high where the rung `high` acted. Episodes whose transcript leaves the agent no room are left out, with a
    warning, and all of them where templates name what logs do not tell. `probability` is what was logged, else 1 or 0 by what
    acted; what forward passes read is not logged, so `processed` is 0.
    """
    episodes, steps, too_long = [], [], 0
    if logged and (untold := prompter.named & {"steps_left", "admissible_commands"}):
        log.warning(
            "%d ingested episodes are left out: logs do not tell {%s}, which agent.prompt names",
            len(logged),
            min(untold),
        )
        logged = []
    for episode in logged:
        segments, actions = _tokens(episode, prompter)
        if sum(map(len, segments + actions)) + prompter.prompt.max_action_tokens > capacity:
            too_long += 1
            continue
        episode_id = f"{INGESTED}/{episode.episode_id}"
        acted = [step.precision == high for step in episode.steps]
        reward = float(episode.success) if episode.reward is None else episode.reward
        episodes.append(
            (
                episode_id,
                episode.task_id,
                episode.task_type,
                INGESTED,
                0,
                episode.observation,
                episode.success,
                reward,
                len(acted),
                sum(acted),
            )
        )
        steps += [
            (
                episode_id,
                turn,
                step.command,
                step.observation,
                acted[turn],
                float(acted[turn]) if step.probability is None else step.probability,
                *tokens,
                0,
            )
            for turn, (step, *tokens) in enumerate(zip(episode.steps, segments, actions, strict=True))
        ]
    if too_long:
        log.warning("%d ingested episodes are left out: too long for the agent's %d tokens", too_long, capacity)
    return pl.DataFrame(episodes, schema=EPISODES, orient="row"), pl.DataFrame(steps, schema=STEPS, orient="row")


def _tokens(episode: LoggedEpisode, prompter: Prompter) -> tuple[list[list[int]], list[list[int]]]:
    """Segment and action of each step."""
    shown = [step.observation for step in episode.steps[:-1]]
    opening = prompter.opening(episode.observation, episode.task)
    turns = (prompter.turn(seen, episode.task, Moment(step)) for step, seen in enumerate(shown, start=2))
    segments = [opening, *turns]
    return segments, [prompter.action(step.command, step.thought) for step in episode.steps]
