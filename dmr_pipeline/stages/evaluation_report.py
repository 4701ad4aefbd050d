"""Stage `evaluation_report`: every policy on the test games, once; the headline router is chosen on validation."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from pydantic import JsonValue

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.evaluation.curve_metrics import curves_of
from dmr_pipeline.evaluation.curves import as_baselines, best_rules, play_curves, tunables
from dmr_pipeline.evaluation.figures import figures
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.metrics import compute_metrics
from dmr_pipeline.evaluation.play import (
    Arena,
    acting_facts,
    content,
    evaluate,
    router_content,
    static_beside_the_route,
)
from dmr_pipeline.evaluation.plots import (
    plot_accuracy_cost,
    plot_calibration,
    plot_curves,
    plot_kl_by_turn,
    plot_training_curves,
)
from dmr_pipeline.evaluation.policies import (
    ROUTERS,
    choose_headline,
    confidence_cascade,
    play_test,
    router_entries,
    seconds_per_step,
    speculative_differences,
    speculative_entries,
)
from dmr_pipeline.evaluation.report import curves_table, headline, markdown_table
from dmr_pipeline.evaluation.results import BestRule
from dmr_pipeline.evaluation.transcripts import choices, openings, transcripts
from dmr_pipeline.evaluation.tuning import Range
from dmr_pipeline.precision.frontier import clearly_beaten
from dmr_pipeline.precision.ladder import LadderFacts, read_ladder
from dmr_pipeline.progress import Bars
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.policy import RoutingPolicy, SinglePrecision
from dmr_pipeline.rollout.prompts import truncation_policy
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.labels import read_sensitivity
from dmr_pipeline.router.model import load_router
from dmr_pipeline.router.policies import routing_policy

log = logging.getLogger(__name__)


def evaluation_report(context: StageContext) -> StageResult:
    recipe = context.recipe
    test = benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "test")
    validation = benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "validation")
    checkpoints = context.inputs["quantized_checkpoints"]
    ladder = read_ladder(checkpoints)
    route = ladder.route
    tables = KeptTables(context.kept or context.scratch, {"games": content(context.inputs["benchmark_tasks"])})
    on_validation, on_test = (tables.under(split=split) for split in ("validation", "test"))
    # The other rungs first: as long as they act, the routed ones are not in memory.
    frames = static_beside_the_route(checkpoints, recipe, test, on_test)
    facts = acting_facts(checkpoints, recipe, route)
    on_validation, on_test = on_validation.under(**facts), on_test.under(**facts)
    arena = Arena.load(checkpoints, recipe, recipe.evaluation.seed)
    cheapest, device = arena.rollouts.acting.models[route[-1]], arena.rollouts.device
    routers = {name: load_router(context.inputs[name] / ROUTER_FOLDER, device, cheapest) for name in ROUTERS}
    drafts = recipe.precisions.speculative
    files = {name: router_content(context.inputs[name], router, drafts) for name, router in routers.items()}

    with Bars() as progress:
        candidates = router_entries(routers, files, arena.rollouts.slots(len(validation)))
        known, known_on_test = Known(), Known()
        validated = evaluate(candidates, arena, validation, progress, " on validation", on_validation, known)
        chosen, choice = choose_headline(validated, recipe.grpo_router)
        games = validation[: recipe.evaluation.confidence_games]
        cascade = confidence_cascade(arena, games, recipe.evaluation, progress, on_validation, known)
        shown: dict[str, pl.DataFrame] = {}
        frames += play_test(
            arena, routers, files, cascade, test, recipe.evaluation, progress, on_test, known_on_test, shown
        )
        bar = progress.add_task(f"what each precision would do, {chosen}", total=len(shown[chosen]))
        would = choices(
            arena.rollouts,
            shown[chosen],
            recipe.sensitivity.tokens,
            on_test.under(router=files[chosen], policy=chosen),
            lambda n: progress.advance(bar, n),
        )
        progress.update(bar, completed=len(shown[chosen]))
        curves, rules = None, dict[str, BestRule]()
        if recipe.evaluation.budgets:
            tuned_on = validation[: recipe.evaluation.budget_games]
            slots = arena.rollouts.slots(max(len(tuned_on), len(test)))
            compared = tunables(arena, routers, files, recipe.evaluation, slots)
            on = Range(arena, tuned_on, progress, on_validation.under(tuned_on=len(tuned_on)), known)
            curves = play_curves(compared, recipe.evaluation.budgets, on, arena, test, on_test, known_on_test)
            rules = best_rules(curves, validated, tuned_on)
            frames += as_baselines(curves, rules)
    tables.drop_unused()
    episodes, section = pl.concat(frames), recipe.evaluation
    differences = speculative_differences(episodes) if recipe.agent.temperature == 0 else []
    for sentence in differences:
        log.warning("%s", sentence)
    metrics = compute_metrics(
        episodes,
        recipe=recipe.name,
        route=route,
        high="always_high",
        low="always_low",
        headline=chosen,
        margin=recipe.precisions.margin,
        confidence=section.confidence,
        bootstrap=section.bootstrap,
        seed=section.seed,
    )
    if curves is not None:
        metrics["curves"] = curves_of(
            curves.episodes,
            curves.settings,
            episodes,
            high="always_high",
            low="always_low",
            confidence=section.confidence,
            bootstrap=section.bootstrap,
            seed=section.seed,
        )
        metrics["best_rules"] = rules
        curves.episodes.write_parquet(context.output / "curves.parquet")
    episodes.write_parquet(context.output / "episodes.parquet")
    transcripts(shown).write_parquet(context.output / "transcripts.parquet")
    openings(shown[chosen], test).write_parquet(context.output / "openings.parquet")
    would.write_parquet(context.output / "choices.parquet")
    _write_json(context.output / "metrics.json", metrics)
    _write_json(
        context.output / "context.json",
        report_context(
            context, choice, [*lookup_notes(recipe), *beaten_notes(ladder), *outgrown_notes(episodes), *differences]
        ),
    )
    tables_shown = "\n".join(filter(None, (markdown_table(metrics), curves_table(metrics))))
    (context.output / "table.md").write_text(tables_shown + "\n", encoding="utf-8")

    plots = context.output / "plots"
    plots.mkdir()
    kl, grpo = context.inputs["kl_router"], context.inputs["grpo_router"]
    plot_accuracy_cost(metrics, plots / "accuracy_cost.png")
    if "curves" in metrics:
        plot_curves(metrics, plots / "curves.png")
    labels = read_sensitivity(context.inputs["sensitivity_dataset"])
    kl_log, grpo_log = pl.read_parquet(kl / "training.parquet"), pl.read_parquet(grpo / "training.parquet")
    calibration = pl.read_parquet(kl / "validation.parquet")
    plot_kl_by_turn(labels, plots / "kl_by_turn.png")
    plot_training_curves(kl_log, grpo_log, plots / "training_curves.png")
    plot_calibration(
        calibration["probability"].to_numpy(),
        calibration["sensitive"].cast(pl.Float64).to_numpy(),
        plots / "calibration.png",
    )
    _write_json(context.output / "figures.json", figures(labels, kl_log, grpo_log, calibration))
    summary: dict[str, JsonValue] = {"headline": chosen, "verdict": " ".join(headline(metrics))}
    for name, policy in metrics["policies"].items():
        score = f", score {policy['score']:.3f}" if "score" in policy else ""
        summary[name] = (
            f"success {policy['success']:.3f}{score}, high-precision ratio {policy['high_ratio']:.3f}, "
            f"cost {policy['cost']:.3f}"
        )
    speculative = speculative_entries(route, recipe.precisions.speculative) if arena.rollouts.can_draft else []
    acting: dict[str, RoutingPolicy] = {
        "always_high": SinglePrecision(route[0], route),
        "always_low": SinglePrecision(route[-1], route),
        **{entry.name: entry.policy for entry in speculative},
        "confidence": cascade,
        **{name: routing_policy(router, 1) for name, router in routers.items()},
    }
    timed = {name: seconds_per_step(policy, arena, test[:_TIMED_GAMES]) for name, policy in acting.items()}
    looked_up = {"validation": known.share, "test": known_on_test.share}
    return StageResult(summary=summary, measured={"seconds_per_step": timed, "share_of_actions_looked_up": looked_up})


def report_context(
    context: StageContext, on_validation: dict[str, dict[str, float]], more_notes: Sequence[str]
) -> dict[str, JsonValue]:
    """What the report shows beside the metrics; of the recipe, the sections that the stage declares."""
    recipe = context.recipe
    facts = read_ladder(context.inputs["quantized_checkpoints"])
    table = read_sensitivity(context.inputs["sensitivity_dataset"])
    route, bits = facts.route, {rung.name: rung.bits_per_weight for rung in facts.rungs}
    trained = recipe.agent.training is not None
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"name", "runtime"}, exclude_none=True),
        "ladder": [
            {
                "name": rung.name,
                "bits_per_weight": rung.bits_per_weight,
                "bytes": rung.bytes,
                "kl_to_float": rung.kl_to_float,
                "success_validation": rung.validation_success,
                "cost_validation": rung.cost,
                "dominated_by": rung.dominated_by,
            }
            for rung in facts.rungs
        ],
        "verdict": facts.verdict.model_dump(mode="json"),
        "sensitivity": {
            "steps": table.select("episode_id", "turn").n_unique(),
            **_label_facts(table, route),
        },
        **{
            name: {
                **{f"{fact} on validation": value for fact, value in on_validation[name].items()},
                **_summary(context.inputs[name]),
            }
            for name in ROUTERS
        },
        "notes": [
            f"The agent is {'a tiny LLM trained here' if trained else recipe.agent.pretrained.model}; "  # type: ignore[union-attr]
            f"high is {route[0]}, low is {route[-1]} ({bits[route[-1]]:.2f} bits a weight, embeddings and scales included).",
            "The test games were played once; threshold, rung, checkpoint and headline router were chosen on validation games,"
            " the headline router by the reward of stage 2.",
            "The paper's numbers come from other agents, games and precisions; nothing here is a reproduction of them.",
            f"What the agent reads: {truncation_policy(recipe.agent.prompt.page)}.",
            *benchmark_of(recipe.benchmark).notes(_summary(context.inputs["benchmark_tasks"])),
            *more_notes,
        ],
    }


def _label_facts(table: pl.DataFrame, route: Sequence[str]) -> dict[str, JsonValue]:
    """Of each cheaper rung; its name is told where there are several."""
    facts: dict[str, JsonValue] = {}
    for rung in route[1:]:
        rows, of_rung = table.filter(pl.col("precision") == rung), "" if len(route) == 2 else f", {rung}"
        facts[f"share of steps that are sensitive{of_rung}"] = rows["sensitive"].mean()  # type: ignore[assignment]
        facts[f"share of steps whose greedy actions differ{of_rung}"] = 1 - rows["greedy_agree"].mean()  # type: ignore[assignment, operator]
    return facts


def lookup_notes(recipe: Recipe) -> list[str]:
    """How what is written is looked up, if it is."""
    if recipe.precisions.prompt_lookup is None:
        return []
    return [
        "What every precision writes is looked up in the transcript (precisions.prompt_lookup) and costs the passes that it then"
        " takes; the unit of cost is an episode at a pass a token."
    ]


def beaten_notes(ladder: LadderFacts) -> list[str]:
    """The rungs that did not play the test games, and why."""
    rungs = {rung.name: rung for rung in ladder.rungs}
    return [
        f"{name} did not play the test games: on the {rungs[name].games or ladder.games} validation games it won"
        f" {rungs[name].validation_success:.1%} at a cost of {rungs[name].cost:.3f}, {better} won"
        f" {rungs[better].validation_success:.1%} at {rungs[better].cost:.3f}."
        for name, better in clearly_beaten(ladder.rungs).items()
        if name not in ladder.route
    ]


def outgrown_notes(episodes: pl.DataFrame) -> list[str]:
    """Who lost episodes for want of room in the transcript; nothing where nobody did."""
    lost = episodes.filter("outgrown").group_by("policy", maintain_order=True).len()
    if lost.is_empty():
        return []
    counts = ", ".join(f"{policy} {count}" for policy, count in lost.iter_rows())
    return [f"Episodes that outgrew the transcript (agent.max_transcript_tokens) and count as lost: {counts}."]


def _summary(folder: Path) -> dict[str, JsonValue]:
    """Facts that the stage of this folder told of itself."""
    manifest = folder / "manifest.json"
    summary: dict[str, JsonValue] = (
        json.loads(manifest.read_text(encoding="utf-8"))["summary"] if manifest.exists() else {}
    )
    return {fact.replace("_", " "): value for fact, value in summary.items() if isinstance(value, int | float | str)}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


_TIMED_GAMES = 10
