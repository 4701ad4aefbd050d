"""What a study plays: each router and each rule at each budget, tuned on validation games, once on games that nothing was chosen
on; and what needs no tuning: the rungs alone, speculative acting, the oracle."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
from pydantic import JsonValue
from rich.progress import Progress

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.play import PLAYED, Arena, Entry, acting_facts, content, evaluate, rung_alone
from dmr_pipeline.evaluation.policies import speculative_entries
from dmr_pipeline.evaluation.tuning import Range, Tunable, Tuned, mean_of, spend_of, tune_to_ratios
from dmr_pipeline.precision.frontier import clearly_beaten
from dmr_pipeline.precision.ladder import read_ladder
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.engine import SinglePrecision
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.router.baselines import Disagreement
from dmr_pipeline.router.budgets import Bar
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import load_router
from dmr_pipeline.router.policies import asking_policy
from dmr_pipeline.router.rules import rules
from dmr_pipeline.study.design import Study

EPISODES = pl.Schema(
    {
        **PLAYED,
        "seed": pl.Int64(),
        "budget": pl.Float64(),
        "validation_success": pl.Float64(),
        "validation_ratio": pl.Float64(),
        "validation_cost": pl.Float64(),
    }
)
"""Rows of `PLAYED`; `seed` of the router's training, null of what was not trained; `budget` that it was tuned to, null of what
was not tuned, and what it did on validation games at that bar."""


@dataclass(frozen=True)
class Field:
    """Where a study plays."""

    arena: Arena
    validation: Sequence[Task]
    fresh: Sequence[Task]
    on_validation: KeptTables
    on_fresh: KeptTables


def play_study(
    study: Study,
    recipe: Recipe,
    routers: Mapping[tuple[str, int], Path],
    data_root: Path,
    folder: Path,
    progress: Progress,
) -> pl.DataFrame:
    """Rows of `EPISODES`. What was played is kept: a study that was broken off goes on.

    Args:
        recipe: the study's.
        routers: (name, seed) -> artifact.
        data_root: with the recipe's artifacts.
        folder: where episodes are kept; it need not exist.
    """
    tasks, checkpoints = (
        artifact_folder(name, recipe.name, data_root) for name in ("benchmark_tasks", "quantized_checkpoints")
    )
    benchmark, ladder = benchmark_of(recipe.benchmark), read_ladder(checkpoints)
    validation = benchmark.read_tasks(tasks, "validation", study.validation_games)
    fresh = list(benchmark.fresh_tasks(study.games)) or benchmark.read_tasks(tasks, "test")[: study.games]
    kept = KeptTables(folder, {"games": content(tasks)})
    on_fresh = kept.under(split="study", count=len(fresh))
    beaten = clearly_beaten(ladder.rungs)
    alone = [
        rung_alone(checkpoints, recipe, rung.name, fresh, on_fresh)
        for rung in recipe.precisions.ladder
        if rung.name not in ladder.route and rung.name not in beaten
    ]
    facts = acting_facts(checkpoints, recipe, ladder.route)
    arena = Arena.load(checkpoints, recipe, recipe.evaluation.seed)
    ground = Field(
        arena,
        validation,
        fresh,
        kept.under(split="validation", count=len(validation), **facts),
        on_fresh.under(**facts),
    )
    known, known_there = Known(), Known()
    frames = [*alone, *_untuned(ground, recipe, progress, known)]
    nothing = [pl.lit(None).alias(name) for name in EPISODES.names() if name not in PLAYED]
    found = [frame.with_columns(nothing) for frame in frames]
    on = Range(arena, validation, progress, ground.on_validation, known_there, Bar(0.5))
    for tunable, seed in [*_routers(ground, routers), *_rules(ground, recipe)]:
        tuned = tune_to_ratios(tunable, on, study.budgets)
        found.append(_played_at(ground, tunable, seed, dict(zip(study.budgets, tuned, strict=True)), progress, known))
    return pl.concat([frame.select(EPISODES.names()).cast(EPISODES) for frame in found])


def _untuned(ground: Field, recipe: Recipe, progress: Progress, known: Known) -> list[pl.DataFrame]:
    rollouts = ground.arena.rollouts
    route = rollouts.route
    entries = [Entry(f"always_{rung}", "rung", SinglePrecision(rung, route)) for rung in route]
    if rollouts.can_draft:
        entries += [
            replace(entry, variant_of="") for entry in speculative_entries(route, recipe.precisions.speculative)
        ]
    entries.append(Entry("disagreement", "oracle", Disagreement(route)))
    return list(
        evaluate(entries, ground.arena, ground.fresh, progress, " on fresh games", ground.on_fresh, known).values()
    )


def _routers(ground: Field, routers: Mapping[tuple[str, int], Path]) -> Iterator[tuple[Tunable, int | None]]:
    rollouts = ground.arena.rollouts
    cheapest, slots = rollouts.acting.models[rollouts.acting.cheapest], rollouts.slots(len(ground.fresh))
    for (name, seed), artifact in routers.items():
        router = load_router(artifact / ROUTER_FOLDER, rollouts.device, cheapest)
        parameters: dict[str, JsonValue] = {"router": content(artifact, f"{ROUTER_FOLDER}/")}
        yield Tunable(name, "router", asking_policy(router, slots), parameters, router.pass_bytes), seed


def _rules(ground: Field, recipe: Recipe) -> Iterator[tuple[Tunable, int | None]]:
    rollouts = ground.arena.rollouts
    found = rules(rollouts.route, rollouts.step_limit, rollouts.prompter, rollouts.can_draft, ground.arena.seed)
    for name, rule in found.items():
        yield Tunable(f"rule:{name}", "rule", rule, {"checks": rule.drafter is not None}), None


def _played_at(
    ground: Field, tunable: Tunable, seed: int | None, tuned: Mapping[float, Tuned], progress: Progress, known: Known
) -> pl.DataFrame:
    """One policy at all budgets. Where two have led to the same bar it is played once."""
    bars = list(dict.fromkeys(found.bar for found in tuned.values()))
    entries = [
        replace(tunable.at(bar, ground.arena), name=f"{tunable.name}@{bar.threshold!r},{bar.ties!r}") for bar in bars
    ]
    tables = evaluate(entries, ground.arena, ground.fresh, progress, " on fresh games", ground.on_fresh, known)
    played = dict(zip(bars, tables.values(), strict=True))
    return pl.concat(
        played[found.bar].with_columns(
            policy=pl.lit(tunable.name),
            seed=pl.lit(seed, pl.Int64()),
            budget=pl.lit(budget),
            validation_success=pl.lit(mean_of(found.played, "success")),
            validation_ratio=pl.lit(spend_of(found.played)),
            validation_cost=pl.lit(mean_of(found.played, "cost")),
        )
        for budget, found in tuned.items()
    )
