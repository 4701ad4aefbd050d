"""Stage `kl_router`: stage 1 of the router, class-weighted cross-entropy on the sensitivity labels (see router/kl.py), or
advantages or consequences (see router/advantage.py and router/swapped.py)."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import polars as pl
import torch

from dmr_pipeline.agent.memory import out_of_memory_names
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.tables import INGESTED, read_all_trajectories
from dmr_pipeline.progress import Bars
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.router.advantage import advantage_loss, mixed, spread, targets
from dmr_pipeline.router.calibration import auprc, auroc, brier, exceedances, expected_calibration_error, platt
from dmr_pipeline.router.kl import (
    ROUTER_FOLDER,
    calibrate_threshold,
    fit,
    games_of,
    held_out,
    labels_of_steps,
    search_summary,
    train,
    untrained,
    validate,
    with_settings,
)
from dmr_pipeline.router.labels import read_drafts, read_sensitivity, threshold
from dmr_pipeline.router.model import save_router, sequences_of_steps, with_features, with_numbers
from dmr_pipeline.router.neighbours import remember
from dmr_pipeline.router.probe import NeighboursHead, ProbeHead
from dmr_pipeline.router.swapped import read_swapped, steps_of
from dmr_pipeline.router.swapped import targets as effects
from dmr_pipeline.summaries import KlSummary


def kl_router(context: StageContext) -> StageResult:
    recipe, section = context.recipe, context.recipe.kl_router
    rollouts = Rollouts.load(context.inputs["quantized_checkpoints"], recipe)
    route, acting = rollouts.route, rollouts.acting
    given = read_all_trajectories(
        context.inputs, recipe.precisions.names, rollouts.route, rollouts.prompter, rollouts.capacity
    )
    sensitivity = read_sensitivity(context.inputs["sensitivity_dataset"])
    drafts = read_drafts(context.inputs["sensitivity_dataset"])
    tau = threshold(sensitivity, recipe.sensitivity)
    searches = search_summary(given.steps, sensitivity, recipe, tau)
    steps = given.steps
    if section.target == "advantage":
        steps = mixed(steps, given.episodes.filter(pl.col("policy") != INGESTED))
    elif section.target == "consequence":
        swapped = read_swapped(context.inputs["sensitivity_dataset"])
        steps = steps_of(steps, swapped)
    router = untrained(section.model, rollouts, section.seed)
    sequences = sequences_of_steps(steps, router.settings)
    with Bars() as progress:
        bar = progress.add_task("episodes that the router's agent reads", total=len(sequences))
        sequences = with_features(
            router,
            sequences,
            section.batch_episodes,
            rollouts.processes,
            rollouts.sharing,
            partial(progress.advance, bar),
        )
        progress.update(bar, completed=len(sequences))
    if isinstance(router.model, ProbeHead):
        sequences = with_numbers(router, sequences, steps, drafts, rollouts.prompter.command)
        router.model.standardize(torch.cat([s.features for s in sequences if s.features is not None]))
    labels = labels_of_steps(steps, sensitivity, route)
    held = held_out(games_of(steps, given.episodes), section.held_out, section.seed)
    with out_of_memory_names("kl_router.batch_episodes"):
        its: Sequence[torch.Tensor]
        if section.target == "divergence":
            its = [torch.tensor(classes) for classes in labels]
        elif section.target == "advantage":
            its = targets(steps, given.episodes, drafts, route, sequences, section.seed, section.estimator)
        else:
            its = effects(steps, swapped, route, section.agreeing_weight)
        if isinstance(router.model, NeighboursHead):
            router = remember(router, sequences, its, section.target, held)
            log = pl.DataFrame(schema={"update": pl.Int64, "loss": pl.Float64})
        elif section.target == "divergence":
            router, log = train(router, sequences, labels, section, context.scratch, held)
        else:
            router, log = fit(router, sequences, its, advantage_loss, section, context.scratch, held)
    router = with_settings(router, force_search=searches.get("search_forced", False))

    games = benchmark_of(recipe.benchmark).read_tasks(
        context.inputs["benchmark_tasks"], "validation", section.validation_games
    )
    validation = validate(router, games, rollouts, recipe, tau)
    classes = validation["rung"].to_numpy()
    sensitive = classes > 0
    labelled = sensitive.any() and not sensitive.all()
    if not labelled and section.target == "divergence":
        raise UserError(
            f"kl_router: {'all' if sensitive.any() else 'none'} of the {len(validation)} steps on validation games are"
            " sensitive; set another sensitivity.quantile or tau, or more kl_router.validation_games"
        )
    margins = np.array(validation["margins"].to_list())
    if section.target == "divergence":
        unweighted = margins + router.settings.shifts
        before = exceedances(unweighted)
        scale, shifts = platt(unweighted, classes)
        offsets = [scale * old + new for old, new in zip(router.settings.shifts, shifts, strict=True)]
    else:
        scale, offsets = spread(margins)
    router = with_settings(router, scale=scale, offsets=router.settings.named(offsets))
    levels = exceedances(scale * margins + offsets)
    probabilities = levels[:, -1]  # that more than the cheapest rung is asked for
    clock, known = Timings(), Known()
    router, point, tried = calibrate_threshold(
        router, levels.ravel(), section.target_ratio, games, rollouts, section.seed, clock, known
    )

    save_router(router, context.output / ROUTER_FOLDER)
    log.write_parquet(context.output / "training.parquet")
    validation = validation.with_columns(probability=pl.Series(probabilities), sensitive=pl.Series(sensitive))
    validation.select("episode_id", "turn", "probability", "sensitive").write_parquet(
        context.output / "validation.parquet"
    )
    pl.DataFrame([vars(tried_point) for tried_point in tried]).write_parquet(context.output / "calibration.parquet")
    quality: dict[str, object] = {}
    if labelled:
        quality = {
            "auroc": round(auroc(probabilities, sensitive), 5),
            "auprc": round(auprc(probabilities, sensitive), 5),
        }
    if section.target == "divergence":
        quality |= {
            "brier": round(brier(probabilities, sensitive), 5),
            "ece": round(expected_calibration_error(probabilities, sensitive), 5),
            "brier_before_platt": round(brier(before[:, -1], sensitive), 5),
            "platt_scale": scale,
            "platt_shifts": shifts,
        }
    llm = acting.models[acting.dearest].num_parameters()
    return StageResult(
        summary=KlSummary(
            parameters=router.parameters,
            share_of_llm_parameters=round(router.parameters / llm, 5),
            train_steps=len(steps),
            train_label_share=round(float(np.mean([y > 0 for episode in labels for y in episode])), 5),
            final_loss=round(float(np.mean(log["loss"].tail(50).to_numpy())), 5) if len(log) else None,
            tau=tau,
            **searches,
            validation_games=len(games),
            validation_steps=len(validation),
            validation_label_share=round(float(sensitive.mean()), 5),
            **quality,
            scale=router.settings.scale,
            offsets=router.settings.offsets,
            threshold=point.threshold,
            target_ratio=section.target_ratio,
            validation_spend=round(point.spend, 5),
            validation_success=round(point.success, 5),
        ).model_dump(),
        measured={
            "seconds_per_step": (clock.router + clock.agent + clock.environment) / clock.steps,
            "share_of_actions_looked_up": known.share,
        },
    )
