"""What a study plays: each router and each rule at each budget, tuned on validation games, once on games that nothing was chosen
on; and what needs no tuning: the rungs alone, speculative acting, the oracle."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
from rich.progress import Progress

from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.benchmark import Benchmark, benchmark_of
from dmr_pipeline.environments.reworded import RewordedTask
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.curves import CURVES, RULE, SETTINGS, oracles, play_curves, tunables
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.play import Arena, Entry, acting_facts, content, evaluate, static_beside_the_route
from dmr_pipeline.evaluation.policies import speculative_entries
from dmr_pipeline.evaluation.tuning import Range
from dmr_pipeline.pipeline import STAGES, find_stage
from dmr_pipeline.precision.ladder import read_ladder
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.benchmark import Games
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.router.baselines import Disagreement
from dmr_pipeline.router.budgets import Bar
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import load_router
from dmr_pipeline.study.design import Study
from dmr_pipeline.study.made import Made
from dmr_pipeline.study.results import ORACLE

EPISODES = pl.Schema({**CURVES, **SETTINGS, "seed": pl.Int64()})
"""Rows of `CURVES` with those of `SETTINGS` beside them, null of what was not tuned; `seed` of the training, null of what was
not trained. Names of rules begin with `rule:`."""


def play_study(
    study: Study,
    made: Made,
    folder: Path,
    progress: Progress,
) -> pl.DataFrame:
    """Rows of `EPISODES`. What was played is kept: a study that was broken off goes on, and another one of the same recipe does
    not play it again.

    Args:
        folder: where episodes are kept; it need not exist.
    """
    recipe, tasks, checkpoints, games, routers = made.recipe, made.tasks, made.checkpoints, made.games, made.routers
    benchmark, ladder = benchmark_of(recipe.benchmark), read_ladder(checkpoints)
    validation = benchmark.read_tasks(tasks, "validation", study.validation_games)
    fresh = _games(study, benchmark, tasks, games)
    kept = KeptTables(
        folder, {"version": find_stage("evaluation_report", STAGES).code_version}
    )  # how policies play there
    on_validation = kept.under(games=content(tasks), split="validation", count=len(validation))
    on_fresh = kept.under(games=content(games or tasks), split="study", count=len(fresh))
    if study.first_game:
        on_fresh = on_fresh.under(first_game=study.first_game)
    if study.reworded is not None:
        fresh = _reworded(fresh, study.reworded)
        on_fresh = on_fresh.under(reworded=study.reworded)
    at_work = recipe.with_step_limit(study.step_limit or (study.benchmark or recipe.benchmark).step_limit)
    others = static_beside_the_route(checkpoints, at_work, fresh, on_fresh)
    on_validation = on_validation.under(**acting_facts(checkpoints, recipe, ladder.route))
    on_fresh = on_fresh.under(**acting_facts(checkpoints, at_work, ladder.route))
    arena, known, section = Arena.load(checkpoints, recipe, recipe.evaluation.seed), Known(), recipe.evaluation
    arena_at_work = arena.with_step_limit(at_work.benchmark.step_limit)
    others += _untuned(arena_at_work, recipe, fresh, on_fresh, known, progress)

    acting, names = arena.rollouts.acting, {f"{name}/{seed}": (name, seed) for name, seed in routers}
    folders = {label: routers[key] / ROUTER_FOLDER for label, key in names.items()}
    loaded = {
        label: load_router(path, acting.device, acting.models[acting.cheapest]) for label, path in folders.items()
    }
    files = {label: content(routers[key], f"{ROUTER_FOLDER}/") for label, key in names.items()}
    rules = section.model_copy(update={"rules": study.rules or section.rules})
    slots = arena.rollouts.slots(max(len(validation), len(fresh)))
    compared = tunables(arena, loaded, files, rules, slots)
    compared += oracles(arena, study.oracles, recipe.sensitivity.tokens, slots)
    on = Range(arena, validation, progress, on_validation, Known(), Bar(0.5))
    played = play_curves(compared, study.budgets, on, arena_at_work, fresh, on_fresh, known)
    tuned = played.episodes.join(played.settings, on=["policy", "budget"], how="left", maintain_order="left")
    found = [tuned, *(frame.with_columns(budget=pl.lit(None, pl.Float64())) for frame in others)]
    seeds = {label: seed for label, (_, seed) in names.items()}
    policies = {label: name for label, (name, _) in names.items()}
    return (
        pl.concat(found, how="diagonal")
        .with_columns(seed=pl.col("policy").replace_strict(seeds, default=None, return_dtype=pl.Int64()))
        .with_columns(
            policy=pl.when(kind=RULE).then("rule:" + pl.col("policy")).otherwise(pl.col("policy").replace(policies))
        )
        .select(EPISODES.names())
        .cast(EPISODES)
    )


def _games(study: Study, own: Benchmark[Games], tasks: Path, games: Path | None) -> list[Task]:
    """Those that are played at the end.

    Args:
        own: the recipe's benchmark, and `tasks` its artifact.
        games: artifact of the study's, where it names one.
    """
    if study.benchmark is not None and games is not None:
        return list(benchmark_of(study.benchmark).read_tasks(games, "test", study.games))
    fresh = own.fresh_tasks(study.first_game + study.games)[study.first_game :]
    return list(fresh) or list(own.read_tasks(tasks, "test", study.games))


def _reworded(games: Sequence[Task], seed: int) -> list[Task]:
    """
    Raises:
        UserError: they read as before, so that the study would show what it does not.
    """
    others = [RewordedTask(game, seed) for game in games]
    some = list(zip(games, others, strict=True))[:20]
    if all(game.episode().first_observation() == other.episode().first_observation() for game, other in some):
        raise UserError(
            'reworded: none of these games lists anything after "you see" when it begins, so that they would read as they are;'
            " leave it out"
        )
    return list(others)


def _untuned(
    arena: Arena, recipe: Recipe, games: Sequence[Task], kept: KeptTables, known: Known, progress: Progress
) -> list[pl.DataFrame]:
    rollouts, route = arena.rollouts, arena.rollouts.route
    entries = [Entry(f"always_{rung}", "rung", SinglePrecision(rung, route)) for rung in route]
    if rollouts.can_draft:
        entries += [
            replace(entry, variant_of="") for entry in speculative_entries(route, recipe.precisions.speculative)
        ]
    entries.append(Entry(ORACLE, "oracle", Disagreement(route)))
    return list(evaluate(entries, arena, games, progress, " on fresh games", kept, known).values())
