"""Stage `trajectories`: episodes on the router_train games by the behaviour policies that the recipe names. What a behaviour has
played is kept: a run that was broken off goes on with the next one."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import polars as pl
from pydantic import JsonValue

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.progress import Bars
from dmr_pipeline.recipe.trajectories import BehaviourPolicy, Trajectories
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import PolicyRuns, Rollouts
from dmr_pipeline.rollout.policy import RoutingPolicy, SinglePrecision
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.baselines import RandomMixing

log = logging.getLogger(__name__)


def trajectories(context: StageContext) -> StageResult:
    recipe = context.recipe
    rollouts = Rollouts.load(context.inputs["quantized_checkpoints"], recipe)
    runs = [
        RolloutRequest(game)
        for game in benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "router_train")
    ]
    acting = behaviours(recipe.trajectories, rollouts.route)
    kept, known, clock = KeptTables(context.scratch / "behaviours"), Known(), Timings()
    found = {one.name: whole for one in acting if (whole := _kept(kept, one.name)) is not None}
    if found:
        log.info("played before a run was broken off: %s", ", ".join(found))
    missing = [behaviour for behaviour in acting if behaviour.name not in found]

    def on_played(index: int, played: list[Trajectory], spent: Timings) -> None:
        name = missing[index].name
        clock.add(spent)
        episodes, steps = to_frames(played, name)
        found[name] = _Played(episodes, steps, pl.DataFrame({"outgrown": [t.outgrown for t in played]}))
        for what, table in found[name]._asdict().items():
            kept.write(table, behaviour=name, what=what)

    with Bars() as progress:
        plays = []
        for behaviour in missing:
            bar = progress.add_task(f"episodes by {behaviour.name}", total=len(runs))
            policy = behaviour_policy(behaviour, rollouts.route, recipe.trajectories.seed)
            plays.append(PolicyRuns(policy, runs, partial(progress.advance, bar)))
        if plays:
            rollouts.play_each(plays, recipe.trajectories.seed, on_played, known)
    tables = [found[behaviour.name] for behaviour in acting]
    pl.concat([its.episodes for its in tables]).write_parquet(context.output / "episodes.parquet")
    pl.concat([its.steps for its in tables]).write_parquet(context.output / "steps.parquet")
    seconds = (clock.agent + clock.environment) / max(clock.steps, 1)
    return StageResult(
        summary={behaviour.name: _told(its) for behaviour, its in zip(acting, tables, strict=True)},
        measured={"seconds_per_step": seconds, "share_of_actions_looked_up": known.share} if plays else {},
    )


class _Played(NamedTuple):
    """What a behaviour has played."""

    episodes: pl.DataFrame
    steps: pl.DataFrame
    outgrown: pl.DataFrame
    """Of each episode, whether its transcript has outgrown its room."""


def _kept(kept: KeptTables, name: str) -> _Played | None:
    """Of a behaviour that an earlier run of the same inputs has finished."""
    tables = [table for what in _Played._fields if (table := kept.read(behaviour=name, what=what)) is not None]
    return _Played(*tables) if len(tables) == len(_Played._fields) else None


def _told(its: _Played) -> dict[str, JsonValue]:
    told: dict[str, JsonValue] = {
        "episodes": len(its.episodes),
        "steps": len(its.steps),
        "success": round(int(its.episodes["success"].sum()) / len(its.episodes), 4),
    }
    outgrown = int(its.outgrown["outgrown"].sum())
    return told | {"outgrown": outgrown} if outgrown else told


def behaviours(section: Trajectories, route: Sequence[str]) -> Sequence[BehaviourPolicy]:
    """As the recipe names them, or each routed rung alone and all of them in equal shares."""
    alone = [BehaviourPolicy(name=f"all-{rung}", shares={rung: 1.0}) for rung in route]
    mixed = BehaviourPolicy(name="mixed", shares=dict.fromkeys(route, 1 / len(route)))
    return section.behaviour or [*alone, mixed]


def behaviour_policy(behaviour: BehaviourPolicy, route: Sequence[str], seed: int) -> RoutingPolicy:
    shares = {rung: behaviour.shares.get(rung, 0.0) for rung in route}
    alone = [rung for rung, share in shares.items() if share == 1.0]
    return SinglePrecision(alone[0], route) if alone else RandomMixing(shares, seed)
