"""A router, or a rule that nobody trained, set to a budget on validation games, in closed loop, and checked on games that nobody
has seen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import polars as pl
from pydantic import JsonValue
from rich.progress import Progress

from dmr_pipeline.environments.base import Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.curves import tunables
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.metrics import game_weights, percentiles, success_interval
from dmr_pipeline.evaluation.play import Arena, acting_facts, content, evaluate, router_content
from dmr_pipeline.evaluation.results import Interval
from dmr_pipeline.evaluation.tuning import Range, Tunable, mean_of, spend_of, tune_to_cost, tune_to_ratios
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.evaluation import Evaluation, RuleName
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.router.budgets import Bar
from dmr_pipeline.router.kl import ROUTER_FOLDER, with_settings
from dmr_pipeline.router.model import Router, load_router
from dmr_pipeline.router.policies import asking_policy

RouterName = Literal["kl_router", "grpo_router"]
NAMES = (*get_args(RouterName), *get_args(RuleName))
"""Of all that can be calibrated."""
_CLOSE_ENOUGH = 0.005
"""Ratio, as in `find_bars`."""
_VERSION = 1
"""Of what is kept: to be raised where the code plays other episodes."""


@dataclass(frozen=True)
class RouteBudget:
    """What is asked for, at most: one of the first two."""

    high_ratio: float | None
    """Spend, of two rungs the share of the steps at the dearer one (see `ActingModels.spend`)."""
    cost: float | None
    """Mean cost of an episode, in the unit of rollout/cost.py."""
    sample: bool = False
    """As in `Bar`."""
    strict: bool = False
    """No episode is over the ratio at any step, see `Bar.strict`."""

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: not exactly one budget, or one that cannot be.
        """
        if (self.high_ratio is None) == (self.cost is None):
            raise UserError("give one budget: --high-ratio 0.2, or --cost 0.5")
        if self.high_ratio is not None and not 0.001 <= self.high_ratio <= 0.999:
            raise UserError(f"--high-ratio {self.high_ratio:g}: give a share of the steps from 0.001 to 0.999")
        if self.cost is not None and not 0 < self.cost < float("inf"):
            raise UserError(f"--cost {self.cost:g}: give a mean cost of an episode, above 0")
        if self.strict and self.high_ratio is None:
            raise UserError("--strict holds a ratio in every episode: give --high-ratio")

    @property
    def mode(self) -> Bar:
        return Bar(0.5, sample=self.sample, strict=self.high_ratio if self.strict else None)


class Played(FrozenModel):
    """A router at its bar on some games; intervals at the recipe's confidence, by game."""

    games: int
    high_ratio: float
    """Spend, see `RouteBudget`."""
    high_ratio_ci95: Interval
    success: float
    success_ci95: Interval
    cost: float
    cost_ci95: Interval


class Calibration(FrozenModel):
    """The bar that a budget has led to."""

    threshold: float
    ties: float
    sample: bool
    strict: float | None
    validation: Played
    fresh: Played | None
    """None where the benchmark has a list of tasks that ends."""

    @property
    def bar(self) -> Bar:
        return Bar(self.threshold, self.ties, self.sample, self.strict)


def calibrate(
    recipe: Recipe,
    name: str,
    budget: RouteBudget,
    artifacts: dict[str, Path],
    validation: Sequence[Task],
    fresh: Sequence[Task],
    folder: Path,
    progress: Progress,
) -> tuple[Calibration, Router | None]:
    """Find the bar on validation games, and play fresh ones at it.

    Args:
        name: of NAMES.
        artifacts: stage -> folder, verified: `benchmark_tasks`, `quantized_checkpoints` and, of a router, its own.
        folder: where episodes are kept, so that the same command goes on where it broke off; it need not exist.

    Returns:
        Beside it, the router so calibrated; None of a rule.

    Raises:
        UserError: no bar keeps the budget on validation games, or the step limit is too short for the rule.
    """
    checkpoints = artifacts["quantized_checkpoints"]
    arena = Arena.load(checkpoints, recipe, recipe.evaluation.seed)
    router = None
    if name in get_args(RouterName):
        acting = arena.rollouts.acting
        router = load_router(artifacts[name] / ROUTER_FOLDER, arena.rollouts.device, acting.models[acting.cheapest])
        tunable = Tunable(
            name,
            "router",
            asking_policy(router, arena.rollouts.slots(max(len(validation), len(fresh)))),
            {"router": router_content(artifacts[name], router, recipe.precisions.speculative)},
            router.pass_bytes,
        )
    else:
        tunable = _rule(name, arena, recipe.evaluation)
    facts: dict[str, JsonValue] = {
        "version": _VERSION,
        "games": content(artifacts["benchmark_tasks"]),
        **acting_facts(checkpoints, recipe, arena.rollouts.route),
    }
    kept, known = KeptTables(folder, facts), Known()
    on_validation = kept.under(split="validation", count=len(validation))
    on = Range(arena, validation, progress, on_validation, known, budget.mode)
    if budget.high_ratio is not None:
        (tuned,) = tune_to_ratios(tunable, on, [budget.high_ratio], _CLOSE_ENOUGH)
        spent = spend_of(tuned.played)
        if spent > budget.high_ratio:
            raise UserError(
                f"{name} spends {spent:.3f} at least, with its forced steps, which is more than --high-ratio"
                f" {budget.high_ratio:g}: ask for more"
            )
    else:
        assert budget.cost is not None
        found, least = tune_to_cost(tunable, on, budget.cost)
        if found is None:
            raise UserError(
                f"--cost {budget.cost:g}: {name} costs {least:.3f} at least on validation games: ask for more"
            )
        tuned = found
    entry, fresh_played = tunable.at(tuned.bar, arena), None
    if fresh:
        on_fresh = kept.under(split="fresh", count=len(fresh))
        played = evaluate([entry], arena, fresh, progress, " on fresh games", on_fresh, Known())[name]
        fresh_played = measured(played, recipe.evaluation)
    bar = tuned.bar
    changes = {"threshold": bar.threshold, "ties": bar.ties, "sample": bar.sample, "strict": bar.strict}
    result = Calibration(**changes, validation=measured(tuned.played, recipe.evaluation), fresh=fresh_played)
    if router is None:
        return result, None
    calibrated = with_settings(router, **changes, target_ratio=budget.high_ratio)
    return result, replace(router, settings=calibrated.settings)


def _rule(name: str, arena: Arena, section: Evaluation) -> Tunable:
    found = tunables(arena, {}, {}, section.model_copy(update={"rules": (name,)}), slots=0)
    if not found:
        raise UserError(f"{name}: a step limit of {arena.rollouts.step_limit} is too short for it")
    return found[0]


def measured(played: pl.DataFrame, section: Evaluation) -> Played:
    """Of rows of `PLAYED`, an episode a game."""
    played = played.sort("task_id")
    weights = game_weights(played.height, section.bootstrap, section.seed)
    spend, steps, cost = (played[column].cast(pl.Float64).to_numpy() for column in ("spend", "steps", "cost"))
    success = played["success"].cast(pl.Float64).to_numpy()
    return Played(
        games=played.height,
        high_ratio=round(spend_of(played), 6),
        high_ratio_ci95=_rounded(percentiles((weights @ spend) / (weights @ steps), section.confidence)),
        success=round(mean_of(played, "success"), 6),
        success_ci95=_rounded(success_interval(success, 1, weights, section.confidence)),
        cost=round(mean_of(played, "cost"), 6),
        cost_ci95=_rounded(percentiles(weights @ cost, section.confidence)),
    )


def _rounded(interval: Interval) -> Interval:
    return [round(end, 6) for end in interval]
