"""Stage `trajectories`: episodes on the router_train games by the behaviour policies that the recipe names."""

from collections.abc import Sequence
from functools import partial

import polars as pl

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.progress import Bars
from dmr_pipeline.recipe.trajectories import BehaviourPolicy, Trajectories
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import PolicyRuns, Rollouts
from dmr_pipeline.rollout.policy import RoutingPolicy, SinglePrecision
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.baselines import RandomMixing


def trajectories(context: StageContext) -> StageResult:
    recipe = context.recipe
    rollouts = Rollouts.load(context.inputs["quantized_checkpoints"], recipe)
    runs = [
        RolloutRequest(game)
        for game in benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "router_train")
    ]
    acting = behaviours(recipe.trajectories, rollouts.route)
    clock, frames, summary = Timings(), [], {}

    def on_played(index: int, played: list[Trajectory], spent: Timings) -> None:
        name = acting[index].name
        clock.add(spent)
        frames.append(to_frames(played, name))
        summary[name] = {
            "episodes": len(played),
            "steps": sum(len(t.steps) for t in played),
            "success": round(sum(t.success for t in played) / len(played), 4),
        }
        if outgrown := sum(t.outgrown for t in played):
            summary[name]["outgrown"] = outgrown

    with Bars() as progress:
        plays = []
        for behaviour in acting:
            bar = progress.add_task(f"episodes by {behaviour.name}", total=len(runs))
            policy = behaviour_policy(behaviour, rollouts.route, recipe.trajectories.seed)
            plays.append(PolicyRuns(policy, runs, partial(progress.advance, bar)))
        known = Known()
        rollouts.play_each(plays, recipe.trajectories.seed, on_played, known)
    episodes, steps = (pl.concat(parts) for parts in zip(*frames, strict=True))
    episodes.write_parquet(context.output / "episodes.parquet")
    steps.write_parquet(context.output / "steps.parquet")
    seconds = (clock.agent + clock.environment) / clock.steps
    measured = {"seconds_per_step": seconds, "share_of_actions_looked_up": known.share}
    return StageResult(summary=summary, measured=measured)


def behaviours(section: Trajectories, route: Sequence[str]) -> Sequence[BehaviourPolicy]:
    """As the recipe names them, or each routed rung alone and all of them in equal shares."""
    alone = [BehaviourPolicy(name=f"all-{rung}", shares={rung: 1.0}) for rung in route]
    mixed = BehaviourPolicy(name="mixed", shares=dict.fromkeys(route, 1 / len(route)))
    return section.behaviour or [*alone, mixed]


def behaviour_policy(behaviour: BehaviourPolicy, route: Sequence[str], seed: int) -> RoutingPolicy:
    shares = {rung: behaviour.shares.get(rung, 0.0) for rung in route}
    alone = [rung for rung, share in shares.items() if share == 1.0]
    return SinglePrecision(alone[0], route) if alone else RandomMixing(shares, seed)
