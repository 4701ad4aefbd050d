"""Stage `evaluation_report`: every policy on the test games, once; the headline router is chosen on validation."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import torch
from pydantic import JsonValue
from rich.progress import Progress

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.tasks import read_tasks
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.metrics import compute_metrics
from dmr_pipeline.evaluation.play import Entry, acting_facts, content, evaluate, rung_alone
from dmr_pipeline.evaluation.plots import (
    plot_accuracy_cost,
    plot_calibration,
    plot_kl_by_turn,
    plot_training_curves,
)
from dmr_pipeline.evaluation.report import headline, markdown_table
from dmr_pipeline.precision.ladder import Ladder, read_ladder
from dmr_pipeline.recipe import GrpoRouter
from dmr_pipeline.rollout.cost import reward
from dmr_pipeline.rollout.engine import Clock, RoutingPolicy, Run, SinglePrecision, Trajectory
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.prompts import truncation_policy
from dmr_pipeline.router.baselines import Confidence, Disagreement, RandomMixing
from dmr_pipeline.router.calibration import OperatingPoint, find_threshold
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.labels import read_sensitivity
from dmr_pipeline.router.model import Router, load_router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.router.search_steps import opens_at_search_bar

ROUTERS = ("kl_router", "grpo_router")
HEADLINE_RATIO = 0.40
"""High-precision ratio on validation that the headline router should stay under: the larger of the paper's budgets K."""
_TIMED_GAMES = 10


def evaluation_report(context: StageContext) -> StageResult:
    recipe = context.recipe
    torch.set_num_threads(recipe.runtime.threads)
    test = read_tasks(context.inputs["benchmark_tasks"], "test")
    validation = read_tasks(context.inputs["benchmark_tasks"], "validation")
    checkpoints, high, low = context.inputs["quantized_checkpoints"], recipe.precisions.high, recipe.precisions.low
    tables = KeptTables(context.kept or context.scratch, {"games": content(context.inputs["benchmark_tasks"])})
    on_validation, on_test = (tables.under(split=split) for split in ("validation", "test"))
    # The other rungs first, one after another: as long as they act, high and low are not in memory.
    frames = [
        rung_alone(checkpoints, recipe, rung.name, test, on_test)
        for rung in recipe.precisions.ladder
        if rung.name not in (high, low)
    ]
    facts = acting_facts(checkpoints, recipe, high, low)
    on_validation, on_test = on_validation.under(**facts), on_test.under(**facts)
    ladder = Ladder.load(checkpoints, recipe)
    routers = {
        name: load_router(context.inputs[name] / ROUTER_FOLDER, ladder.device, ladder.models[False]) for name in ROUTERS
    }
    files = {name: content(context.inputs[name], f"{ROUTER_FOLDER}/") for name in ROUTERS}

    with Progress() as progress:
        candidates = router_entries(routers, files, ladder.slots(len(validation)))
        known, known_on_test = Known(), Known()
        validated = evaluate(candidates, ladder, validation, progress, " on validation", on_validation, known)
        chosen, choice = choose_headline(validated, recipe.grpo_router)
        games = validation[: recipe.evaluation.confidence_games]
        cascade = confidence_cascade(ladder, games, progress, on_validation, known)
        frames += play_test(ladder, routers, files, cascade, test, progress, on_test, known_on_test)
    tables.drop_unused()
    episodes, section = pl.concat(frames), recipe.evaluation
    metrics = compute_metrics(
        episodes,
        recipe=recipe.name,
        high="always_high",
        low="always_low",
        headline=chosen,
        confidence=section.confidence,
        bootstrap=section.bootstrap,
        seed=section.seed,
    )
    episodes.write_parquet(context.output / "episodes.parquet")
    _write_json(context.output / "metrics.json", metrics)
    _write_json(context.output / "context.json", report_context(context, choice, outgrown_notes(episodes)))
    (context.output / "table.md").write_text(markdown_table(metrics) + "\n", encoding="utf-8")

    plots = context.output / "plots"
    plots.mkdir()
    kl, grpo = context.inputs["kl_router"], context.inputs["grpo_router"]
    plot_accuracy_cost(metrics, plots / "accuracy_cost.png")
    plot_kl_by_turn(read_sensitivity(context.inputs["sensitivity_dataset"]), plots / "kl_by_turn.png")
    plot_training_curves(
        pl.read_parquet(kl / "training.parquet"),
        pl.read_parquet(grpo / "training.parquet"),
        plots / "training_curves.png",
    )
    calibration = pl.read_parquet(kl / "validation.parquet")
    plot_calibration(
        calibration["probability"].to_numpy(),
        calibration["sensitive"].cast(pl.Float64).to_numpy(),
        plots / "calibration.png",
    )
    summary: dict[str, JsonValue] = {"headline": chosen, "verdict": " ".join(headline(metrics))}
    for name, policy in metrics["policies"].items():
        score = f", score {policy['score']:.3f}" if "score" in policy else ""
        summary[name] = (
            f"success {policy['success']:.3f}{score}, high-precision ratio {policy['high_ratio']:.3f}, "
            f"cost {policy['cost']:.3f}"
        )
    acting: dict[str, RoutingPolicy] = {
        "always_high": SinglePrecision(high=True),
        "always_low": SinglePrecision(high=False),
        "confidence": cascade,
        **{name: routing_policy(router, 1) for name, router in routers.items()},
    }
    timed = {name: seconds_per_step(policy, ladder, test[:_TIMED_GAMES]) for name, policy in acting.items()}
    looked_up = {"validation": known.share, "test": known_on_test.share}
    return StageResult(summary=summary, measured={"seconds_per_step": timed, "share_of_actions_looked_up": looked_up})


def play_test(
    ladder: Ladder,
    routers: Mapping[str, Router],
    files: Mapping[str, JsonValue],
    cascade: Confidence,
    games: Sequence[Task],
    progress: Progress,
    kept: KeptTables,
    known: Known,
) -> list[pl.DataFrame]:
    """Rows of all policies but the rungs alone, in the report's order. Arguments as of `router_entries` and `evaluate`."""
    slots = ladder.slots(len(games))
    compared = entries(routers, files, cascade, slots)
    if opens_at_search_bar(games[0]):
        compared += search_entries(routers, files, slots)
    # These first: the others come by many of their transcripts.
    in_turn = sorted(compared, key=lambda entry: entry.name not in ("always_high", "always_low", "disagreement"))
    played = evaluate(in_turn, ladder, games, progress, kept=kept, known=known)
    section = ladder.recipe.evaluation
    mixes = {name: random_mix(name, played[name], section.seed, section.random_draws) for name in routers}
    played |= evaluate(list(mixes.values()), ladder, games, progress, kept=kept, known=known)
    names = [[entry.name] + ([mixes[entry.name].name] if entry.name in mixes else []) for entry in compared]
    return [played[name] for name in chain(*names)]


def entries(
    routers: Mapping[str, Router], files: Mapping[str, JsonValue], cascade: Confidence, slots: int
) -> list[Entry]:
    """Policies to evaluate, but for random mixing. Arguments as of `router_entries`."""
    return [
        Entry("always_high", "single", SinglePrecision(high=True)),
        Entry("always_low", "single", SinglePrecision(high=False)),
        Entry("confidence", "baseline", cascade, {"threshold": cascade.threshold}),
        *router_entries(routers, files, slots),
        Entry("disagreement", "oracle", Disagreement()),
    ]


def router_entries(routers: Mapping[str, Router], files: Mapping[str, JsonValue], slots: int) -> list[Entry]:
    """
    Args:
        files: name of a router -> what it was loaded from, by content.
        slots: episodes at once.
    """
    return [
        Entry(name, "router", routing_policy(router, slots), {"router": files[name]}, router_bytes=router.weight_bytes)
        for name, router in routers.items()
    ]


def search_entries(routers: Mapping[str, Router], files: Mapping[str, JsonValue], slots: int) -> list[Entry]:
    """What forcing search steps does: each router with it switched, its threshold as it is; and searches alone at high
    precision, which needs no router. Arguments as of `router_entries`."""
    compared = [Entry("search_only", "baseline", RandomMixing(0.0, 0, force_search=True))]
    for name, router in routers.items():
        forced = router.settings.force_search
        switched = replace(router, settings=router.settings.model_copy(update={"force_search": not forced}))
        compared.append(
            Entry(
                f"{name}{'-' if forced else '+'}search",
                "ablation",
                routing_policy(switched, slots),
                {"router": files[name]},
                router_bytes=router.weight_bytes,
            )
        )
    return compared


def random_mix(router: str, played: pl.DataFrame, seed: int, draws: int) -> Entry:
    """Random mixing at the ratio at which a router has played."""
    ratio = _ratio(played)
    parameters: dict[str, JsonValue] = {"ratio": ratio, "seed": seed}
    return Entry(f"random@{router}", "random", RandomMixing(ratio, seed), parameters, draws)


def confidence_cascade(
    ladder: Ladder, games: Sequence[Task], progress: Progress, kept: KeptTables, known: Known
) -> Confidence:
    """At the threshold that gives the recipe's ratio in closed loop on validation games."""
    section, runs = ladder.recipe.evaluation, [Run(game) for game in games]
    bar = progress.add_task("confidence on validation", total=None)

    def play(threshold: float) -> list[Trajectory]:
        policy = Confidence(threshold)
        return ladder.play(runs, policy, section.seed, advance=lambda n: progress.advance(bar, n), known=known)

    facts: dict[str, JsonValue] = {"confidence_ratio": section.confidence_ratio, "confidence_games": len(games)}
    found = kept.read(**facts)
    if found is None:
        alone = np.array([step.probability for trajectory in play(math.inf) for step in trajectory.steps])
        point, _ = find_threshold(lambda t: OperatingPoint.of(t, play(t)), alone, section.confidence_ratio)
        found = pl.DataFrame({"threshold": [point.threshold]})
        kept.write(found, **facts)
    progress.update(bar, total=1, completed=1)
    return Confidence(found["threshold"].item())


def choose_headline(played: Mapping[str, pl.DataFrame], section: GrpoRouter) -> tuple[str, dict[str, dict[str, float]]]:
    """The router with the higher mean reward of stage 2, which weighs success and cost as the recipe does, among those whose
    ratio is within HEADLINE_RATIO (all, if none's is). This rule is ours.

    Args:
        played: router -> rows of `metrics.EPISODES` on validation games.

    Returns:
        Beside its name, what each router does on these games.
    """
    found: dict[str, dict[str, float]] = {}
    for name, frame in played.items():
        rewards = [reward(won, cost, section) for won, cost in frame.select("success", "cost").iter_rows()]
        found[name] = {
            "stage_2_reward": round(float(np.mean(rewards)), 6),
            "success": round(float(frame["success"].mean()), 6),  # type: ignore[arg-type]
            "high_ratio": round(_ratio(frame), 6),
            "cost": round(float(frame["cost"].mean()), 6),  # type: ignore[arg-type]
        }
    within = [name for name in found if found[name]["high_ratio"] <= HEADLINE_RATIO] or list(found)
    return max(within, key=lambda name: found[name]["stage_2_reward"]), found


def seconds_per_step(policy: RoutingPolicy, ladder: Ladder, games: Sequence[Task]) -> dict[str, JsonValue]:
    """One episode at a time, as an interactive agent runs: mean and p95 of a step, and the router's share of it."""
    seconds: list[float] = []
    router = 0.0
    for game in games:
        clock = Clock()
        ladder.play([Run(game)], policy, ladder.recipe.evaluation.seed, clock)
        seconds += clock.durations
        router += clock.router
    return {
        "mean": float(np.mean(seconds)),
        "p95": float(np.quantile(seconds, 0.95)),
        "router_share": router / sum(seconds),
    }


def report_context(
    context: StageContext, on_validation: dict[str, dict[str, float]], more_notes: Sequence[str]
) -> dict[str, JsonValue]:
    """What the report shows beside the metrics; of the recipe, the sections that the stage declares."""
    recipe = context.recipe
    facts = read_ladder(context.inputs["quantized_checkpoints"])
    table = read_sensitivity(context.inputs["sensitivity_dataset"])
    low = next(rung for rung in facts.rungs if rung.name == recipe.precisions.low)
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
            }
            for rung in facts.rungs
        ],
        "gate": {"passed": facts.gate.passed, "verdict": facts.gate.verdict},
        "sensitivity": {
            "steps": len(table),
            "share of steps that are sensitive": float(table["sensitive"].mean()),  # type: ignore[arg-type]
            "share of steps whose greedy actions differ": 1 - float(table["greedy_agree"].mean()),  # type: ignore[arg-type]
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
            f"high is {recipe.precisions.high}, low is {recipe.precisions.low} ({low.bits_per_weight:.2f} bits a weight, "
            "embeddings and scales included).",
            "The test games were played once; threshold, rung, checkpoint and headline router were chosen on validation games,"
            " the headline router by the reward of stage 2.",
            "The paper's numbers come from other agents, games and precisions; nothing here is a reproduction of them.",
            f"What the agent reads: {truncation_policy(recipe.agent.prompt.page)}.",
            *benchmark_notes(context.inputs["benchmark_tasks"]),
            *more_notes,
        ],
    }


def outgrown_notes(episodes: pl.DataFrame) -> list[str]:
    """Who lost episodes for want of room in the transcript; nothing where nobody did."""
    lost = episodes.filter("outgrown").group_by("policy", maintain_order=True).len()
    if lost.is_empty():
        return []
    counts = ", ".join(f"{policy} {count}" for policy, count in lost.iter_rows())
    return [f"Episodes that outgrew the transcript (agent.max_transcript_tokens) and count as lost: {counts}."]


def benchmark_notes(benchmark_tasks: Path) -> list[str]:
    """What the stage of this folder tells of a shop."""
    summary = _summary(benchmark_tasks)
    words = {"catalogue": "Catalogue of the shop", "nouns": "Nouns of the titles, which rewards compare"}
    return [f"{words[fact]}: {summary[fact]}." for fact in words if fact in summary]


def _summary(folder: Path) -> dict[str, JsonValue]:
    """Facts that the stage of this folder told of itself."""
    manifest = folder / "manifest.json"
    summary: dict[str, JsonValue] = (
        json.loads(manifest.read_text(encoding="utf-8"))["summary"] if manifest.exists() else {}
    )
    return {fact.replace("_", " "): value for fact, value in summary.items() if isinstance(value, int | float | str)}


def _ratio(episodes: pl.DataFrame) -> float:
    return float(episodes["high_steps"].sum()) / float(episodes["steps"].sum())


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
