"""Stage `sensitivity_dataset`: what the routed precisions would have done at each step (see router/labels.py)."""

import polars as pl
from rich.progress import Progress

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.ingestion.tables import read_all_trajectories
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.router.labels import label, measure, threshold
from dmr_pipeline.summaries import SensitivitySummary


def sensitivity_dataset(context: StageContext) -> StageResult:
    recipe = context.recipe
    rollouts = Rollouts.load(context.inputs["quantized_checkpoints"], recipe)
    given = read_all_trajectories(
        context.inputs, recipe.precisions.names, rollouts.route, rollouts.prompter, rollouts.capacity
    )
    with Progress() as progress:
        bar = progress.add_task("divergence of the precisions", total=len(given.episodes))
        counted = recipe.sensitivity.tokens
        rows, drafts = measure(rollouts, given.episodes, given.steps, counted, lambda n: progress.advance(bar, n))
    tau = threshold(rows, recipe.sensitivity)
    table = label(rows, recipe.sensitivity, tau)
    table.write_parquet(context.output / "steps.parquet")
    drafts.write_parquet(context.output / "drafts.parquet")
    late = pl.col("turn") >= 10
    return StageResult(
        summary=SensitivitySummary(
            steps=len(given.steps),
            ingested_steps=given.ingested_steps,
            tau=tau,
            direction=recipe.sensitivity.direction,
            label_share=round(float(table["sensitive"].mean()), 5),  # type: ignore[arg-type]
            greedy_disagreement=round(1 - float(table["greedy_agree"].mean()), 5),  # type: ignore[arg-type]
            mean_kl_high_low=round(float(table["kl_high_low"].mean()), 5),  # type: ignore[arg-type]
            label_share_before_turn_10=_share(table.filter(~late)),
            label_share_from_turn_10=_share(table.filter(late)),
        ).model_dump()
    )


def _share(table: pl.DataFrame) -> float | None:
    return round(float(table["sensitive"].mean()), 5) if len(table) else None  # type: ignore[arg-type]
