"""All that is learned from: the played episodes and, as tables of the same kind, the ingested ones."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dmr_pipeline.ingestion.schema import LoggedEpisode
from dmr_pipeline.ingestion.stored import read_ingested
from dmr_pipeline.rollout.policy import certain
from dmr_pipeline.rollout.prompts import Moment, Prompter
from dmr_pipeline.rollout.tables import EPISODES, STEPS, read_trajectories

log = logging.getLogger(__name__)

INGESTED = "ingested"
"""Policy of the episodes that an agent logged at work."""


@dataclass(frozen=True)
class AllTrajectories:
    """What is learned from: the played episodes, then the ingested ones."""

    episodes: pl.DataFrame
    steps: pl.DataFrame
    ingested_steps: int
    """Steps that were ingested, also those of episodes that are too long for the agent and in neither table."""


def read_all_trajectories(
    inputs: Mapping[str, Path], ladder: Sequence[str], route: Sequence[str], prompter: Prompter, capacity: int
) -> AllTrajectories:
    """The union of the inputs `trajectories` and `ingested_trajectories`, both checked again on reading.

    Args:
        ladder, route: as of `routed`.
        capacity: tokens that a transcript may have.

    Raises:
        UserError: one of the artifacts is not what it should be.
    """
    episodes, steps = read_trajectories(inputs["trajectories"])
    logged = read_ingested(inputs["ingested_trajectories"])
    more_episodes, more_steps = ingested_tables(logged, ladder, route, prompter, capacity)
    return AllTrajectories(
        pl.concat([episodes, more_episodes], rechunk=True),
        pl.concat([steps, more_steps], rechunk=True),
        sum(len(episode.steps) for episode in logged),
    )


def ingested_tables(
    logged: Sequence[LoggedEpisode],
    ladder: Sequence[str],
    route: Sequence[str],
    prompter: Prompter,
    capacity: int,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Logged episodes as tables of the schemas above, tokenized as if the agent had played them.

    A step counts as one of the routed rung that is next to the one that acted, see `routed`. Episodes whose transcript leaves the
    agent no room are left out, with a warning, and all of them where templates name what logs do not tell. `exceedance` is the
    probability of the dearer rung that was logged, where there are two, else what is certain by what acted; what forward passes
    read is not logged, so `tokens_read` is 0.
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
        acted = [routed(step.precision, ladder, route) for step in episode.steps]
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
            )
        )
        steps += [
            (
                episode_id,
                turn,
                step.command,
                step.observation,
                acted[turn],
                _exceedance(acted[turn], step.probability, route),
                *tokens,
                0,
            )
            for turn, (step, *tokens) in enumerate(zip(episode.steps, segments, actions, strict=True))
        ]
    if too_long:
        log.warning("%d ingested episodes are left out: too long for the agent's %d tokens", too_long, capacity)
    return pl.DataFrame(episodes, schema=EPISODES, orient="row"), pl.DataFrame(steps, schema=STEPS, orient="row")


def routed(rung: str, ladder: Sequence[str], route: Sequence[str]) -> str:
    """The routed rung that an acting rung of the ladder counts as: the dearest one that is no dearer, else the cheapest.

    Args:
        ladder: names of all rungs, dearest first.
        route: those of them that are routed.
    """
    below = (name for name in route if ladder.index(name) >= ladder.index(rung))
    return next(below, route[-1])


def _exceedance(acted: str, logged: float | None, route: Sequence[str]) -> list[float]:
    return list(certain(acted, route)) if logged is None or len(route) > 2 else [logged]


def _tokens(episode: LoggedEpisode, prompter: Prompter) -> tuple[list[list[int]], list[list[int]]]:
    """Segment and action of each step."""
    shown = [step.observation for step in episode.steps[:-1]]
    opening = prompter.opening(episode.observation, episode.task)
    turns = (prompter.turn(seen, episode.task, Moment(step)) for step, seen in enumerate(shown, start=2))
    segments = [opening, *turns]
    return segments, [prompter.action(step.command, step.thought) for step in episode.steps]
