"""Stage `kl_router`: stage 1 of the router, class-weighted cross-entropy on the sensitivity labels (see router/kl.py)."""

import numpy as np
import polars as pl
import torch
from scipy.special import expit

from dmr_pipeline.agent.memory import out_of_memory_names
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.tables import read_all_trajectories
from dmr_pipeline.rollout.engine import Clock
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Ladder
from dmr_pipeline.router.calibration import (
    auprc,
    auroc,
    brier,
    expected_calibration_error,
    platt,
)
from dmr_pipeline.router.kl import (
    ROUTER_FOLDER,
    calibrate_threshold,
    labels_of_steps,
    search_summary,
    train,
    validate,
    with_settings,
)
from dmr_pipeline.router.labels import read_sensitivity, threshold
from dmr_pipeline.router.model import (
    new_router,
    save_router,
    sequences_of_steps,
    with_features,
)
from dmr_pipeline.router.probe import ProbeHead


def kl_router(context: StageContext) -> StageResult:
    recipe, section = context.recipe, context.recipe.kl_router
    torch.set_num_threads(recipe.runtime.threads)
    ladder = Ladder.load(context.inputs["quantized_checkpoints"], recipe)
    steps = read_all_trajectories(context.inputs, ladder.prompter, recipe.precisions.high, ladder.capacity).steps
    sensitivity = read_sensitivity(context.inputs["sensitivity_dataset"])
    tau = threshold(sensitivity, recipe.sensitivity)
    searches = search_summary(steps, sensitivity, recipe, tau)
    router = new_router(
        section.model,
        ladder.prompter.tokenizer,
        section.seed,
        ladder.device,
        ladder.models[False],
        ladder.capacity + recipe.benchmark.step_limit,
    )
    sequences = sequences_of_steps(steps, router.settings)
    sequences = with_features(router, sequences, section.batch_episodes, ladder.processes)
    if isinstance(router.model, ProbeHead):
        router.model.standardize(torch.cat([s.features for s in sequences if s.features is not None]))
    labels = labels_of_steps(steps, sensitivity)
    with out_of_memory_names("kl_router.batch_episodes"):
        router, log = train(router, sequences, labels, section, context.scratch)
    router = with_settings(router, force_search=searches.get("search_forced", False))

    games = benchmark_of(recipe.benchmark).read_tasks(
        context.inputs["benchmark_tasks"], "validation", section.validation_games
    )
    validation = validate(router, games, ladder, recipe, tau)
    sensitive = validation["sensitive"].to_numpy()
    if sensitive.all() or not sensitive.any():
        raise UserError(
            f"kl_router: {'all' if sensitive.any() else 'none'} of the {len(validation)} steps on validation games are"
            " sensitive; set another sensitivity.quantile or tau, or more kl_router.validation_games"
        )
    margins = validation["margin"].to_numpy()
    unweighted = margins + router.settings.offset
    scale, shift = platt(unweighted, sensitive)
    router = with_settings(router, scale=scale, offset=scale * router.settings.offset + shift)
    probabilities = expit(router.settings.scale * margins + router.settings.offset)
    clock, known = Clock(), Known()
    router, point, tried = calibrate_threshold(
        router, probabilities, section.target_ratio, games, ladder, section.seed, clock, known
    )

    save_router(router, context.output / ROUTER_FOLDER)
    log.write_parquet(context.output / "training.parquet")
    validation = validation.with_columns(probability=pl.Series(probabilities))
    validation.select("episode_id", "turn", "probability", "sensitive").write_parquet(
        context.output / "validation.parquet"
    )
    pl.DataFrame([vars(tried_point) for tried_point in tried]).write_parquet(context.output / "calibration.parquet")
    llm = ladder.models[True].num_parameters()
    return StageResult(
        summary={
            "parameters": router.parameters,
            "share_of_llm_parameters": round(router.parameters / llm, 5),
            "train_steps": len(steps),
            "train_label_share": round(float(np.mean([y for episode in labels for y in episode])), 5),
            "final_loss": round(float(np.mean(log["loss"].tail(50).to_numpy())), 5),
            "tau": tau,
            **searches,
            "validation_games": len(games),
            "validation_steps": len(validation),
            "validation_label_share": round(float(sensitive.mean()), 5),
            "auroc": round(auroc(probabilities, sensitive), 5),
            "auprc": round(auprc(probabilities, sensitive), 5),
            "brier": round(brier(probabilities, sensitive), 5),
            "ece": round(expected_calibration_error(probabilities, sensitive), 5),
            "brier_before_platt": round(brier(expit(unweighted), sensitive), 5),
            "platt_scale": scale,
            "platt_shift": shift,
            "scale": router.settings.scale,
            "offset": router.settings.offset,
            "threshold": point.threshold,
            "target_ratio": section.target_ratio,
            "validation_high_ratio": round(point.high_ratio, 5),
            "validation_success": round(point.success, 5),
        },
        measured={
            "seconds_per_step": (clock.router + clock.agent + clock.environment) / clock.steps,
            "share_of_actions_looked_up": known.share,
        },
    )
