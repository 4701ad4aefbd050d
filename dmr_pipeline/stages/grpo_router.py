"""Stage `grpo_router`: stage 2 of the router, GRPO on success and cost (see router/grpo.py)."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from dmr_pipeline.agent.memory import out_of_memory_names
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.router.grpo import Scorer, Session, settings_at_ratio, train
from dmr_pipeline.router.kl import ROUTER_FOLDER, calibrate_threshold, play_games, untrained
from dmr_pipeline.router.model import Router, RouterSettings, load_router, save_router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.router.probe import ProbeHead
from dmr_pipeline.summaries import GrpoSummary


def grpo_router(context: StageContext) -> StageResult:
    started = time.perf_counter()
    recipe, section = context.recipe, context.recipe.grpo_router
    rollouts = Rollouts.load(context.inputs["quantized_checkpoints"], recipe)
    acting = rollouts.acting
    games = benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "router_train")
    validation = benchmark_of(recipe.benchmark).read_tasks(
        context.inputs["benchmark_tasks"], "validation", section.validation_games
    )
    stage_1 = context.inputs["kl_router"] / ROUTER_FOLDER

    def load() -> Router:
        router = load_router(stage_1, rollouts.device, acting.models[acting.cheapest])
        return anew(router, recipe, rollouts) if section.start == "untrained" else router

    start = load()
    for problem in (*recipe.kl_router.nothing_for_stage_2(), *section.too_small_to_branch(len(rollouts.route))):
        raise UserError(problem)
    scorer = Scorer(rollouts, start.pass_bytes, section)
    settings = settings_at_ratio(start, scorer, validation, context.scratch)
    start = replace(start, settings=settings)
    session = Session(replace(load(), settings=settings), start, scorer, games, validation)
    with out_of_memory_names("grpo_router.group_size"):
        train(session, section, context.scratch)
    chosen = replace(load(), settings=settings)  # again, since trl leaves marks in the config
    chosen.model.load_state_dict(session.best_weights)
    log = session.log()
    summary = summarize(log, session.best_update, settings)
    target = section.target_ratio if section.budget is None else section.budget.ratio
    if target is not None:
        policy = routing_policy(chosen, rollouts.slots(len(validation)))
        played = play_games(validation, policy, rollouts, section.seed, "router at threshold 0.5", Timings())
        levels = np.array([s.exceedance for trajectory in played for s in trajectory.steps if not s.forced])
        chosen, point, _ = calibrate_threshold(
            chosen, levels.ravel(), target, validation, rollouts, section.seed, Timings(), Known()
        )
        summary |= {
            "target_ratio": target,
            "threshold": point.threshold,
            "calibrated_validation_success": round(point.success, 6),
            "calibrated_validation_ratio": round(point.spend, 6),
        }
    save_router(chosen, context.output / ROUTER_FOLDER)
    log.write_parquet(context.output / "training.parquet")
    measured = {"seconds": time.perf_counter() - started, "share_of_validation_actions_looked_up": session.known.share}
    return StageResult(summary=GrpoSummary(**summary).model_dump(exclude_unset=True), measured=measured)


def anew(router: Router, recipe: Recipe, rollouts: Rollouts) -> Router:
    """The router as it was before stage 1, but for what its features are standardised by, which no label has told."""
    fresh = untrained(recipe.kl_router.model, rollouts, recipe.grpo_router.seed)
    if isinstance(router.model, ProbeHead):
        fresh.model.load_state_dict(dict(router.model.named_buffers()), strict=False)
    return fresh


def summarize(log: pl.DataFrame, chosen_update: int, settings: RouterSettings) -> dict[str, Any]:
    names = ("validation_reward", "validation_success", "validation_ratio", "validation_cost")
    chosen, learned = log.filter(update=chosen_update).row(0, named=True), log.filter(pl.col("update") > 0)
    return {
        "updates": log["update"].max(),
        "chosen_update": chosen_update,
        **{name: round(chosen[name], 6) for name in names},
        **{f"start_{name}": round(log[name][0], 6) for name in names},
        "start_offsets": settings.offsets,
        "tied_groups": round(float(np.mean(learned["tied_groups"].to_numpy())), 6),
        "last_ratio": round(learned["ratio"][-1], 6),
        "last_divergence": round(learned["divergence"][-1], 6),
    }
