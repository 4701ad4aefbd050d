"""Every router and every rule at several budgets: tuned on validation games, played once on the test games.

What is tuned and how is the same for all of them. The rule that a router is compared with is chosen on validation games: of all
rules at all budgets that cost no more there than the router does, the one that wins most.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import polars as pl
from pydantic import JsonValue

from dmr_pipeline.environments.base import Task
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.metrics import rounded
from dmr_pipeline.evaluation.play import PLAYED, Arena, evaluate
from dmr_pipeline.evaluation.results import BestRule
from dmr_pipeline.evaluation.tuning import Range, Tunable, mean_of, spend_of, tune_to_ratios
from dmr_pipeline.recipe.evaluation import Evaluation, OracleName
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.router.model import Router
from dmr_pipeline.router.oracles import Oracle
from dmr_pipeline.router.policies import asking_policy
from dmr_pipeline.router.rules import rules

RULE = "rule"
"""Kind of a curve that nobody trained; the others are a `router`."""
ORACLE = "oracle"
"""Kind of a curve that nobody can deploy."""
CURVES = pl.Schema({"budget": pl.Float64(), **PLAYED})
"""Rows of `PLAYED` on test games, under each budget that was asked for; `policy` is the curve's name."""
SETTINGS = pl.Schema(
    {
        "policy": pl.String(),
        "budget": pl.Float64(),
        "threshold": pl.Float64(),
        "ties": pl.Float64(),
        "validation_spend": pl.Float64(),
        "validation_success": pl.Float64(),
        "validation_cost": pl.Float64(),
    }
)
"""The bar that each budget has led to, and what it did on validation games."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlayedCurves:
    """What compares curves."""

    episodes: pl.DataFrame
    """Rows of `CURVES`."""
    settings: pl.DataFrame
    """Rows of `SETTINGS`."""


def tunables(
    arena: Arena, routers: Mapping[str, Router], files: Mapping[str, JsonValue], section: Evaluation, slots: int
) -> list[Tunable]:
    """All that has a curve, routers first.

    Args:
        files: name of a router -> what it was loaded from, by content.
        slots: episodes at once.
    """
    rollouts = arena.rollouts
    check = rollouts.can_draft
    there = rules(rollouts.route, rollouts.step_limit, rollouts.prompter, check, section.seed)
    speculative = None if rollouts.speculative is None else rollouts.speculative.model_dump(mode="json")
    facts: dict[str, JsonValue] = {"version": _VERSION, "seed": section.seed, "check": check, "drafts": speculative}
    return [
        *(
            Tunable(name, "router", asking_policy(router, slots), {**facts, "router": files[name]}, router.pass_bytes)
            for name, router in routers.items()
        ),
        *(Tunable(name, RULE, rule, facts) for name, rule in there.items() if name in (section.rules or there)),
    ]


def oracles(
    arena: Arena, names: Sequence[OracleName], counted: Literal["action", "command"], slots: int
) -> list[Tunable]:
    """Arguments as of `Oracle`."""
    facts: dict[str, JsonValue] = {"version": _VERSION, "counted": counted}
    return [Tunable(f"oracle-{name}", ORACLE, Oracle(arena.rollouts, name, counted, slots), facts) for name in names]


def play_curves(
    compared: Sequence[Tunable],
    budgets: Sequence[float],
    on: Range,
    arena: Arena,
    test: Sequence[Task],
    on_test: KeptTables,
    known_on_test: Known,
) -> PlayedCurves:
    """Tune and play, a policy after the other: each rollout is kept as soon as it is there.

    Args:
        on: validation games.
        arena: where the test games are played.
    """
    progress, frames, settings = on.progress, [], []
    bar = progress.add_task("curves", total=len(compared))
    for tunable in compared:
        tuned = dict(zip(budgets, tune_to_ratios(tunable, on, budgets), strict=True))
        shown = progress.task_ids
        points = {
            budget: replace(tunable, name=f"{tunable.name}@{budget:g}").at(its.bar, arena)
            for budget, its in tuned.items()
        }
        played = evaluate([*points.values()], arena, test, progress, kept=on_test, known=known_on_test)
        for task in set(progress.task_ids) - set(shown):
            progress.remove_task(task)
        for budget, entry in points.items():
            named = played[entry.name].with_columns(policy=pl.lit(tunable.name), budget=pl.lit(budget))
            frames.append(named.select(CURVES.names()))
            at, its = tuned[budget].bar, tuned[budget].played
            did = (spend_of(its), mean_of(its, "success"), mean_of(its, "cost"))
            settings.append((tunable.name, budget, at.threshold, at.ties, *did))
            if did[0] > budget + 1e-9:
                log.warning(
                    "%s cannot spend as little as %g on validation games (what is forced counts): its point there spends %.3f",
                    tunable.name,
                    budget,
                    did[0],
                )
        progress.advance(bar)
    return PlayedCurves(pl.concat(frames), pl.DataFrame(settings, schema=SETTINGS, orient="row"))


def best_rules(
    played: PlayedCurves, validated: Mapping[str, pl.DataFrame], games: Sequence[Task]
) -> dict[str, BestRule]:
    """For each router the rule that it is compared with, chosen on validation games (see the module); none where all rules cost
    more.

    Args:
        validated: router -> rows of `PLAYED` on validation games, as it will be deployed.
        games: those that rules were tuned on.
    """
    ids = [game.task_id for game in games]
    names = played.episodes.filter(kind=RULE)["policy"].unique()
    points = played.settings.filter(pl.col("policy").is_in(names.implode()))
    found: dict[str, BestRule] = {}
    for router, frame in validated.items():
        cost = mean_of(frame.filter(pl.col("task_id").is_in(ids)), "cost")
        within = points.filter(pl.col("validation_cost") <= cost)
        best = within.sort("validation_success", "validation_cost", descending=[True, False], maintain_order=True)
        if best.height:
            row = best.row(0, named=True)
            found[router] = {
                "rule": row["policy"],
                "budget": row["budget"],
                "validation_success": row["validation_success"],
                "validation_cost": row["validation_cost"],
                "router_validation_cost": cost,
            }
    return cast(dict[str, BestRule], rounded(found))


def as_baselines(played: PlayedCurves, chosen: Mapping[str, BestRule]) -> list[pl.DataFrame]:
    """Rows of `PLAYED` of the rules that routers are compared with, as policies of their own, variants of the router."""
    return [
        played.episodes.filter(policy=best["rule"], budget=best["budget"])
        .with_columns(policy=pl.lit(f"{RULE}@{router}"), kind=pl.lit("baseline"), variant_of=pl.lit(router))
        .select(PLAYED.names())
        for router, best in chosen.items()
    ]


_VERSION = 1
"""Of rules and bars: to be raised where the code decides otherwise."""
