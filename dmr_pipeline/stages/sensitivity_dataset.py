"""Stage `sensitivity_dataset`: what the routed precisions would have done at each step (see router/labels.py), and, on demand,
what becomes of episodes of which single steps are swapped (see router/consequence.py)."""

from collections.abc import Callable
from typing import Literal

import polars as pl

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.evaluation.consequence import Spent, label_recorded
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.ingestion.tables import INGESTED, AllTrajectories, read_all_trajectories
from dmr_pipeline.progress import Bars
from dmr_pipeline.recipe.sensitivity import Consequences
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.router.labels import Measured, label, longest_first, measure, threshold
from dmr_pipeline.summaries import SensitivitySummary


def sensitivity_dataset(context: StageContext) -> StageResult:
    recipe = context.recipe
    rollouts = Rollouts.load(context.inputs["quantized_checkpoints"], recipe)
    given = read_all_trajectories(
        context.inputs, recipe.precisions.names, rollouts.route, rollouts.prompter, rollouts.capacity
    )
    with Bars() as progress:
        bar = progress.add_task("steps at which the precisions are compared", total=len(given.steps))
        kept, counted = KeptTables(context.scratch / "divergences"), recipe.sensitivity.tokens
        rows, drafts = divergences(rollouts, given, counted, kept, lambda count: progress.advance(bar, count))
    tau = threshold(rows, recipe.sensitivity)
    table = label(rows, recipe.sensitivity, tau)
    table.write_parquet(context.output / "steps.parquet")
    drafts.write_parquet(context.output / "drafts.parquet")
    late = pl.col("turn") >= 10
    told, measured = dict[str, object](), dict[str, object]()
    if recipe.sensitivity.consequences is not None:
        swapped, spent = swap(context, recipe.sensitivity.consequences, rollouts, given, table)
        swapped.write_parquet(context.output / "consequences.parquet")
        told = {"consequences": summarize(swapped)}
        share = round(spent.looked_up / max(spent.actions, 1), 5)
        measured = {"consequences": {"seconds": spent.seconds, "actions": spent.actions, "share_looked_up": share}}
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
            **told,
        ).model_dump(),
        measured=measured,
    )


def divergences(
    rollouts: Rollouts,
    given: AllTrajectories,
    counted: Literal["action", "command"],
    kept: KeptTables,
    on_progress: Callable[[int], None],
) -> Measured:
    """As `measure` of all of them, in the same batches, and kept after each round of these: a run that was broken off goes on.

    Args:
        kept: of these very trajectories and precisions.
        on_progress: as of `measure`; steps that were kept count too.
    """
    rounds: list[Measured] = []
    for batches in longest_first(given.steps).iter_slices(rollouts.rows * rollouts.processes):
        its = batches["episode_id"].to_list()
        rows, drafts = kept.read(episodes=its, what="divergences"), kept.read(episodes=its, what="drafts")
        if rows is None or drafts is None:
            some = given.steps.filter(pl.col("episode_id").is_in(its))
            rows, drafts = measure(rollouts, given.episodes, some, counted, on_progress)
            kept.write(rows, episodes=its, what="divergences")
            kept.write(drafts, episodes=its, what="drafts")
        else:
            on_progress(sum(batches["turns"].to_list()))
        rounds.append(Measured(rows, drafts))
    steps = given.steps.select("episode_id", "turn")
    return Measured(
        *(
            steps.join(pl.concat(tables), on=["episode_id", "turn"], how="left", maintain_order="left_right")
            for tables in zip(*rounds, strict=True)
        )
    )


def swap(
    context: StageContext, section: Consequences, rollouts: Rollouts, given: AllTrajectories, table: pl.DataFrame
) -> tuple[pl.DataFrame, Spent]:
    """Rows of `SWAPPED`. What was played is in the scratch folder: a run that was broken off goes on.

    The games are made anew from the recipe's section: an input of this stage they are not, since nothing else here plays.

    Args:
        table: `labels.STEPS`.
    """
    benchmark, folder = benchmark_of(context.recipe.benchmark), context.scratch / "games"
    folder.mkdir(parents=True, exist_ok=True)
    benchmark.make_tasks(folder)
    games = benchmark.read_tasks(folder, "router_train", section.games)
    played = given.episodes.filter(pl.col("policy") != INGESTED)
    with Bars() as progress:
        bar = progress.add_task("games whose steps are swapped", total=len(games))
        return label_recorded(
            rollouts,
            section,
            games,
            played,
            given.steps,
            table,
            context.scratch / "consequences",
            lambda n: progress.advance(bar, n),
        )


def summarize(swapped: pl.DataFrame) -> dict[str, object]:
    """Counts of steps with each cheaper rung, and how many branches they took."""
    labels = swapped["label"].value_counts()
    count = dict(labels.iter_rows())
    differing = int((~swapped["greedy_agree"]).sum())
    return {
        "episodes": swapped["episode_id"].n_unique(),
        "rows": len(swapped),
        "swapped": differing,
        "branches": 2 * differing,
        "needed": count.get("needed", 0),
        "harmful": count.get("harmful", 0),
        "share_needed_where_actions_differ": round(count.get("needed", 0) / max(differing, 1), 5),
    }


def _share(table: pl.DataFrame) -> float | None:
    return round(float(table["sensitive"].mean()), 5) if len(table) else None  # type: ignore[arg-type]
