"""Stage `trajectories`: episodes on the router_train games by the behaviour policies that the recipe names."""

from functools import partial

import polars as pl
import torch
from rich.progress import Progress

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.rollout.engine import Clock, RoutingPolicy, Run, SinglePrecision, Trajectory
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Ladder, PolicyRuns
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.router.baselines import RandomMixing


def trajectories(context: StageContext) -> StageResult:
    recipe = context.recipe
    torch.set_num_threads(recipe.runtime.threads)
    ladder = Ladder.load(context.inputs["quantized_checkpoints"], recipe)
    runs = [
        Run(game)
        for game in benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "router_train")
    ]
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
