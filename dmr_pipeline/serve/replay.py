"""A release's router on the episodes that agents at work have logged: what it would have decided, and how it would have done."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmr_pipeline.artifacts.folders import DATA_ROOT, artifact_folder, incoming_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.inbox import read_dropped
from dmr_pipeline.ingestion.incoming import look
from dmr_pipeline.ingestion.rules import Rules
from dmr_pipeline.ingestion.schema import LoggedEpisode
from dmr_pipeline.ingestion.stored import STAGE, read_ingested
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.features import OF_DRAFTS
from dmr_pipeline.router.model import Router
from dmr_pipeline.router.off_policy import Estimate, LoggedRun, chances_at, estimate
from dmr_pipeline.router.probe import ProbeHead
from dmr_pipeline.serve import release
from dmr_pipeline.serve.deciders import decider_of
from dmr_pipeline.serve.local import Ask, LocalAgents, Turn
from dmr_pipeline.serve.sessions import Decider, Goal

log = logging.getLogger(__name__)

_DECIDED = ("router", "rule", "exploration", "budget")
_OTHERWISE = ("fallback", "forced")
"""Whatever router there is, these steps are as they are."""


@dataclass(frozen=True)
class Replay:
    release: int
    estimate: Estimate
    left_out: int
    """Episodes that do not tell how they were decided, or that one precision alone has decided."""
    agreement: float
    """Mean over the decided steps of the target's probability of what acted."""


def replay(recipe: Recipe, number: int, data_root: Path = DATA_ROOT) -> Replay:
    """
    Raises:
        UserError: an artifact is missing, the router looks at what is not logged, or the log does not tell.
    """
    checkpoints = verify(artifact_folder("quantized_checkpoints", recipe.name, data_root)).path
    rollouts = Rollouts.load(checkpoints, recipe)
    with release.earlier(recipe.name, number, data_root) as folder:
        router = release.load(folder, rollouts)
    _refuse_what_is_not_logged(router)
    logged = logged_episodes(recipe, data_root)
    usable = [episode for episode in logged if is_usable(episode, rollouts.route)]
    agents, decider = LocalAgents(rollouts, slots=1), decider_of(router, 1, number)
    runs = [logged_run(episode, agents, decider, router) for episode in usable]
    found = estimate(runs)
    chosen = [run.target[np.arange(len(run.taken)), run.taken] for run in runs]
    return Replay(number, found, len(logged) - len(usable), float(np.concatenate(chosen).mean()))


def logged_episodes(recipe: Recipe, data_root: Path) -> list[LoggedEpisode]:
    """Those that are ingested, and those that wait for it."""
    artifact = artifact_folder(STAGE, recipe.name, data_root)
    found = read_ingested(verify(artifact).path) if artifact.is_dir() else []
    tasks = artifact_folder("benchmark_tasks", recipe.name, data_root)
    rules = Rules.of(recipe, tasks if tasks.is_dir() else None)
    for file in look(incoming_folder(recipe.name, data_root))[0]:
        episodes, problems = read_dropped(file, rules, {episode.episode_id for episode in found})
        if not problems:  # such a file is not ingested: it was before, or holds games that are held out
            found += episodes
    return found


def is_usable(episode: LoggedEpisode, route: Sequence[str]) -> bool:
    return all(
        step.precision in route and step.propensity is not None and step.reason in _DECIDED + _OTHERWISE
        for step in episode.steps
    )


def logged_run(episode: LoggedEpisode, agents: LocalAgents, decider: Decider, router: Router) -> LoggedRun:
    """The episode with the chances of the router, which reads what the log tells."""
    route, bar = router.settings.route, router.settings.bar
    goal, past = Goal(episode.task_id, episode.task_type, episode.task), list[Turn]()
    taken, propensity, target, numbers = [], [], [], []
    seen = [episode.observation, *(step.observation for step in episode.steps)]
    for turn, step in enumerate(episode.steps):
        if step.reason in _DECIDED:
            session = agents.open(episode.episode_id, RolloutRequest(goal), decider, past=past)
            choice = agents.decide(Ask(session, seen[turn]))
            if choice.reason == "fallback":
                raise UserError(
                    f"the router fails at step {turn + 1} of episode {episode.episode_id!r}: see the warning"
                )
            levels = choice.decision.exceedance
            dearer = sum(before.precision != route[-1] for before in past)
            chances = chances_at(bar, levels, route, turn, dearer)
            acted, wanted = route.index(step.precision), [chances.get(rung, 0.0) for rung in route]
            if step.reason == "budget":  # the session's would have held the target too: nothing dearer than what acted
                wanted = [0.0] * acted + [sum(wanted[: acted + 1]), *wanted[acted + 1 :]]
            taken.append(acted)
            propensity.append(step.propensity)
            target.append(wanted)
            numbers.append([turn / 10, *levels, dearer / max(turn, 1)])
        past.append(Turn(seen[turn], step.command, step.thought, step.precision))
    outcome = float(episode.success) if episode.reward is None else episode.reward
    shape = (len(taken), -1) if taken else (0, len(route))
    return LoggedRun(
        episode.task_id,
        np.array(taken, np.int64),
        np.array(propensity, np.float64),
        np.array(target, np.float64).reshape(shape),
        np.array(numbers, np.float64).reshape(len(taken), len(route) + 1),
        outcome,
    )


def _refuse_what_is_not_logged(router: Router) -> None:
    wanted = set(router.model.config.features) if isinstance(router.model, ProbeHead) else set()
    missing = sorted(wanted & (OF_DRAFTS | {"margin"}))
    if router.settings.force_search:
        missing.append("the admissible commands")
    if missing or router.settings.decides == "after":
        what = ", ".join(missing) or "the cheapest precision's drafts"
        raise UserError(f"the router looks at {what}, which logs do not tell: it cannot be replayed")
