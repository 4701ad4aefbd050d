"""What a study has found, from its episodes: a point for each policy and budget, what it gains over static policies, and whether
a trained router is better than the best rule that nobody trained.

- *Gain*: success minus that of the best mixture of static policies (a rung alone, or checking a cheaper one's drafts) at the same
  cost, all on the same games.
- *Equal cost*: a rule reaches every cost by playing some episodes at one budget, or at an end of the route, and the rest at
  another. Which rule is compared is chosen on validation games, at the router's cost there; the mixture is the best at its cost
  or less on the fresh games.
- Intervals are over games (bootstrap, the same resamples for all policies, the mixture found anew in each, since its shares hang
  on what was drawn); the spread over training seeds is told beside them. What a router loses to the dearest rung has the interval
  of a non-inferiority test (`intervals.paired_interval`).
- The planned comparisons are named in the study's file, before it runs: Holm's correction is over all of them.

All of that is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.stats import permutation_test

from dmr_pipeline.evaluation.metrics import (
    average_gap_recovered,
    average_improvement_in_quality,
    game_weights,
    mean_interval,
    percentiles,
    rounded,
)
from dmr_pipeline.evaluation.results import STATIC, Interval
from dmr_pipeline.evaluation.statistics import games_needed, holm, smallest_difference
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.intervals import paired_interval
from dmr_pipeline.precision.hull import Floats, best_mixture, mixture_at
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.evaluation import Evaluation
from dmr_pipeline.study.design import Study, has_fresh_games

ROUNDS = 9_999
"""Of a permutation test."""
ORACLE = "disagreement"
"""What the policy is called that asks for the dearest rung just where the actions differ, and knows it for nothing."""


class Place(NamedTuple):
    cost: float
    success: float


class Point(FrozenModel):
    """A policy at one budget, or one that has none; means over its seeds."""

    policy: str
    kind: str
    budget: float | None
    success: float
    success_ci95: Interval
    ratio: float
    """Spend of all steps, of two rungs the high-precision ratio."""
    cost: float
    cost_ci95: Interval
    gain: float
    """Over the best mixture of static policies at its cost."""
    gain_ci95: Interval
    by_seed: list[float]
    """Success of each training seed; one number where nothing was trained."""
    seed_deviation: float | None
    """Standard deviation of these; None of one."""
    thresholds: list[float]
    """Of the bar, of each training seed; none where nothing was tuned."""


class Curve(FrozenModel):
    """A policy over all budgets."""

    policy: str
    kind: str
    apgr: float | None
    """None where the dearest rung is not better than the cheapest."""
    aiq: float | None
    """Mean success between the costs of the cheapest and the dearest rung; None where the dearest costs no more."""


class BesideReference(FrozenModel):
    """A tuned policy at one budget against one end of the route alone, or against the oracle that has the dearest rung act just
    where the rungs' actions differ: what is left to win. Not among the planned comparisons: p is not corrected."""

    policy: str
    budget: float
    against: str
    """A rung, or ORACLE."""
    difference: float
    """In success, policy minus reference; means over seeds."""
    difference_ci95: Interval
    p_value: float
    """As `Compared.p_value`."""
    smallest_difference: float | None
    """That as many games show with a chance of 80%; None for none."""
    saved: float
    """Of the reference's cost; below 0 where the policy costs more."""
    saved_ci95: Interval


class Compared(FrozenModel):
    """A trained router at one budget against the best rule at equal cost, and against the dearest rung."""

    router: str
    budget: float
    rule: str
    """Chosen on validation games."""
    cost: float
    rule_cost: float
    """Equal, but where no mixture costs so little, or none that costs as much wins more."""
    difference: float
    """In success, router minus rule."""
    difference_ci95: Interval
    difference_by_seed: list[float]
    """Of each training seed, at its own cost; one number where one was trained."""
    p_value: float
    """Two-sided sign-flip test over games, each at what the mixture would win at the router's cost there."""
    p_holm: float
    lost: float
    """Success of the dearest rung minus the router's."""
    lost_ci95: Interval
    not_worse: bool
    """Whether the router is shown to lose less than `margin` to it."""


class Results(FrozenModel):
    study: Study
    games: int
    fresh: bool
    """Whether these are of seeds that no split uses; else they are a test split's."""
    prompt_lookup: bool
    """Whether every precision has it; then the unit of cost is an episode at a pass a token."""
    confidence: float
    margin: float
    points: list[Point]
    curves: list[Curve]
    references: list[BesideReference]
    compared: list[Compared]


@dataclass(frozen=True)
class _Played:
    """One policy at one budget, by game: means over seeds, [games]."""

    kind: str
    success: Floats
    cost: Floats
    spend: Floats
    steps: Floats
    by_seed: Floats
    """Success, [seeds]."""
    cost_by_seed: Floats
    thresholds: list[float]
    """[seeds], none where nothing was tuned."""
    validation: Place | None

    @property
    def ratio(self) -> float:
        return float(self.spend.sum() / self.steps.sum())


def study_results(
    episodes: pl.DataFrame, study: Study, recipe: Recipe, route: Sequence[str], ends: tuple[Place, Place]
) -> Results:
    """
    Args:
        episodes: rows of `play.EPISODES`.
        recipe: with the study's precisions.
        route: the routed rungs, dearest first.
        ends: the dearest and the cheapest of them alone, on validation games.
    """
    section, margin = recipe.evaluation, recipe.precisions.margin
    played = {
        (policy, budget): _by_game(rows)
        for (policy, budget), rows in episodes.group_by("policy", "budget", maintain_order=True)
    }
    games = episodes["task_id"].n_unique()
    weights = game_weights(games, section.bootstrap, section.seed)
    static = [one for one in played.values() if one.kind in STATIC]
    high, low = played[f"always_{route[0]}", None], played[f"always_{route[-1]}", None]
    references = {route[0]: high, route[-1]: low}
    if (ORACLE, None) in played:
        references[ORACLE] = played[ORACLE, None]
    points = [
        _point(policy, budget, one, static, weights, section.confidence) for (policy, budget), one in played.items()
    ]
    tuned = list(dict.fromkeys(policy for policy, budget in played if budget is not None))
    of = {name: {budget: one for (policy, budget), one in played.items() if policy == name} for name in tuned}
    rules = {name: curve for name, curve in of.items() if next(iter(curve.values())).kind == "rule"}
    compared = [
        _compare(name, budget, curve[budget], rules, high, low, ends, weights, section, margin)
        for name, curve in of.items()
        if next(iter(curve.values())).kind == "router"
        for budget in study.planned
    ]
    adjusted = holm([one.p_value for one in compared])
    results = Results(
        study=study,
        games=games,
        fresh=has_fresh_games(study, recipe),
        prompt_lookup=recipe.precisions.prompt_lookup is not None,
        confidence=section.confidence,
        margin=margin,
        points=points,
        curves=[_curve(name, curve, high, low) for name, curve in of.items()],
        references=[
            _beside(name, budget, one, against, reference, weights, section)
            for name, curve in of.items()
            for budget, one in curve.items()
            if budget is not None
            for against, reference in references.items()
        ],
        compared=[one.model_copy(update={"p_holm": p}) for one, p in zip(compared, adjusted, strict=True)],
    )
    return Results.model_validate(rounded(results.model_dump()))


def _by_game(rows: pl.DataFrame) -> _Played:
    games = (
        rows.group_by("task_id")
        .agg(pl.col("success", "cost", "spend", "steps").cast(pl.Float64).mean())
        .sort("task_id")
    )
    seeds = rows.group_by("seed").agg(pl.col("success", "cost").mean(), pl.col("threshold").first()).sort("seed")
    validation = rows.select(pl.col("validation_cost", "validation_success").mean()).row(0)
    return _Played(
        kind=rows["kind"][0],
        success=games["success"].to_numpy(),
        cost=games["cost"].to_numpy(),
        spend=games["spend"].to_numpy(),
        steps=games["steps"].to_numpy(),
        by_seed=seeds["success"].to_numpy(),
        cost_by_seed=seeds["cost"].to_numpy(),
        thresholds=seeds["threshold"].drop_nulls().to_list(),
        validation=None if validation[0] is None else Place(*validation),
    )


def _point(
    policy: str, budget: float | None, one: _Played, static: Sequence[_Played], weights: Floats, confidence: float
) -> Point:
    costs, successes = (np.stack(values) for values in zip(*((s.cost, s.success) for s in static), strict=True))

    def gain(mean: Floats) -> Floats:
        """Of one resample of the games each, [resamples, games]."""
        found: Floats = mean @ one.success - best_mixture(mean @ costs.T, mean @ successes.T, mean @ one.cost)
        return found

    everything = np.full((1, len(one.success)), 1 / len(one.success))
    return Point(
        policy=policy,
        kind=one.kind,
        budget=budget,
        success=float(one.success.mean()),
        success_ci95=mean_interval(one.success, weights, confidence),
        ratio=float(one.ratio),
        cost=float(one.cost.mean()),
        cost_ci95=percentiles(weights @ one.cost, confidence),
        gain=float(gain(everything)[0]),
        gain_ci95=percentiles(gain(weights), confidence),
        by_seed=[float(success) for success in one.by_seed],
        seed_deviation=float(one.by_seed.std(ddof=1)) if len(one.by_seed) > 1 else None,
        thresholds=one.thresholds,
    )


def _curve(name: str, curve: Mapping[float | None, _Played], high: _Played, low: _Played) -> Curve:
    gap, span = high.success.mean() - low.success.mean(), high.cost.mean() - low.cost.mean()
    points = sorted((one.ratio, one.success.mean(), one.cost.mean()) for one in curve.values())
    recovered = [(ratio, (success - low.success.mean()) / gap) for ratio, success, _ in points] if gap > 0 else []
    ends = [(low.cost.mean(), low.success.mean()), (high.cost.mean(), high.success.mean())]
    offered = [*ends, *((cost, success) for _, success, cost in points)]
    return Curve(
        policy=name,
        kind=next(iter(curve.values())).kind,
        apgr=float(average_gap_recovered(np.array(recovered))) if recovered else None,
        aiq=float(average_improvement_in_quality(offered, ends[0][0], ends[1][0])) if span > 0 else None,
    )


def _beside(
    name: str, budget: float, one: _Played, against: str, reference: _Played, weights: Floats, section: Evaluation
) -> BesideReference:
    difference = one.success - reference.success
    saved = 1 - (weights @ one.cost) / (weights @ reference.cost)
    return BesideReference(
        policy=name,
        budget=budget,
        against=against,
        difference=float(difference.mean()),
        difference_ci95=percentiles(weights @ difference, section.confidence),
        p_value=sign_flip(difference, section.seed),
        smallest_difference=smallest_difference(difference, 1 - section.confidence),
        saved=float(1 - one.cost.mean() / reference.cost.mean()),
        saved_ci95=percentiles(saved, section.confidence),
    )


def _compare(
    name: str,
    budget: float,
    router: _Played,
    rules: Mapping[str, Mapping[float | None, _Played]],
    high: _Played,
    low: _Played,
    ends: tuple[Place, Place],
    weights: Floats,
    section: Evaluation,
    margin: float,
) -> Compared:
    assert router.validation is not None
    at = router.validation.cost

    def on_validation(rule: str) -> tuple[bool, float, float]:
        """Whether it can cost so little, what it then wins, and of equals how cheap its own budgets are."""
        places = [*ends, *(one.validation for one in rules[rule].values() if one.validation is not None)]
        costs, successes = (np.array(values) for values in zip(*places, strict=True))
        won = float(best_mixture(costs, successes, np.array(at)))
        return bool(costs.min() <= at), won, -float(costs[len(ends) :].min())

    best = max(rules, key=on_validation)
    offered = [low, *rules[best].values(), high]
    costs, successes = (np.stack(values) for values in zip(*((o.cost, o.success) for o in offered), strict=True))
    places = costs.mean(1), successes.mean(1)
    shares, slope = mixture_at(*places, float(router.cost.mean()))
    difference = router.success - shares @ successes
    dearer_by = router.cost - shares @ costs
    resampled = best_mixture(weights @ costs.T, weights @ successes.T, weights @ router.cost)
    by_seed = zip(router.by_seed, router.cost_by_seed, strict=True)
    lost_interval = paired_interval(high.success, router.success, section.confidence)
    return Compared(
        router=name,
        budget=budget,
        rule=best,
        cost=float(router.cost.mean()),
        rule_cost=float((shares @ costs).mean()),
        difference=float(difference.mean()),
        difference_ci95=percentiles(weights @ router.success - resampled, section.confidence),
        difference_by_seed=[float(won - best_mixture(*places, np.array(cost))) for won, cost in by_seed],
        p_value=sign_flip(difference - slope * dearer_by, section.seed),
        p_holm=1.0,
        lost=float((high.success - router.success).mean()),
        lost_ci95=list(lost_interval),
        not_worse=lost_interval[1] < margin and len(high.success) >= games_needed(margin, section.confidence),
    )


def sign_flip(differences: Floats, seed: int) -> float:
    """Two-sided p-value: under the null hypothesis a game's difference is as likely to have the other sign."""
    if len(differences) == 1 or not differences.any():
        return 1.0
    found = permutation_test(
        (differences, np.zeros(len(differences))),
        lambda first, second, axis: (first - second).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=ROUNDS,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
