"""What the episodes of an evaluation say: success, score, cost, gap recovered, with intervals and paired tests.

The unit of inference is the game. All policies play the same games, so differences are taken within a game; draws of a
random policy on one game are averaged first and never counted as games of their own. Episodes that share a game are
dependent, which an interval over episodes would ignore.

Intervals of a success rate:
    one episode a game    Wilson's score interval, which stays honest near 0% and 100%;
    several draws a game  percentile bootstrap over games; where the games do not vary (a rate of 0% or 100%) it would
                          have no width, so there it is Wilson's with n = games, as if each had been played once.
Intervals of a score, the mean reward: that bootstrap, also where there is one episode a game. Where every reward is 0 or 1
the score is the success, and is left out. Intervals of costs, of gap recovered, of gains and of paired differences: percentile
bootstrap over games, the policies resampled together. All resamples come from one seed, so the same episodes give the same
bytes in any row order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, cast

import numpy as np
import polars as pl

from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.results import (
    STATIC,
    Curve,
    Gap,
    HullPoint,
    Interval,
    Kind,
    Metrics,
    NonInferiority,
    PairedComparison,
    PolicyMetrics,
    TaskTypeMetrics,
)
from dmr_pipeline.evaluation.statistics import games_needed, holm, paired_p_value, smallest_difference
from dmr_pipeline.intervals import paired_interval, wilson
from dmr_pipeline.precision.hull import Floats, below_hull, best_mixture, rising_hull
from dmr_pipeline.rollout.failures import FAILURES, PARSE_FAILURES

EPISODES = pl.Schema(
    {
        "policy": pl.String(),
        "kind": pl.String(),
        "variant_of": pl.String(),
        "draw": pl.Int64(),
        "task_id": pl.String(),
        "task_type": pl.String(),
        "success": pl.Boolean(),
        "reward": pl.Float64(),
        "steps": pl.Int64(),
        "high_steps": pl.Int64(),
        "tokens": pl.Int64(),
        "high_tokens": pl.Int64(),
        "passes": pl.Int64(),
        "drafted": pl.Int64(),
        "accepted": pl.Int64(),
        "steps_at": pl.List(pl.Int64()),
        "spend": pl.Float64(),
        "bits": pl.Float64(),
        "switches": pl.Int64(),
        "cost": pl.Float64(),
        "cost_cache": pl.Float64(),
        "unfinished": pl.Int64(),
        "no_thought": pl.Int64(),
        "empty": pl.Int64(),
        "inadmissible": pl.Int64(),
    }
)
"""One row per (policy, draw, game). `variant_of`: the router that a policy is compared with, or, of the kind `speculative`, the
policy in which the precision that checks writes itself; empty for most. High is the dearest
routed rung. `steps_at`: steps of each routed rung, dearest first. The kind `rung` is another rung of the ladder that acts alone;
where it is not routed, it has no steps there. `spend` (see `ActingModels.spend`) and `bits` (per weight of the acting rung) are
sums over the steps. `reward` is in [0, 1], and 1 is success. `tokens`: read by all forward passes of the episode, whoever read
them: to act, to catch up after a switch, for a draft or a reading that was thrown away; `high_tokens`: those that the dearest
routed rung read. `passes`: forward passes of the acting precision; `drafted`: tokens that a cheaper one drafted for it, and
`accepted` those that it took. `cost` is in the unit of rollout/cost.py; `cost_cache` is the part of it
that is read from the KV cache. The last four are steps whose action failed so (rollout/failures.py)."""

_KIND_ORDER: Mapping[str, int] = {
    "single": 0,
    "rung": 1,
    "speculative": 2,
    "baseline": 3,
    "random": 4,
    "router": 5,
    "ablation": 6,
    "oracle": 7,
}
PLANNED_BASELINE = "confidence"
_DIGITS = 6
_NOISE = 1e-9
Points = Sequence[tuple[float, float]] | Floats
"""(x, y) each, or [points, 2]."""


@dataclass(frozen=True)
class _Outcomes:
    """A policy's means over draws, one number a game, games in sorted order."""

    kind: Kind
    variant_of: str
    draws: int
    success: Floats
    reward: Floats
    cost: Floats
    cost_cache: Floats


def compute_metrics(
    episodes: pl.DataFrame,
    *,
    recipe: str,
    route: Sequence[str],
    high: str,
    low: str,
    headline: str,
    margin: float = 0.05,
    confidence: float = 0.95,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Metrics:
    """All numbers of the report.

    Args:
        episodes: rows as `EPISODES` says; every policy has all its draws on all games.
        recipe: name, copied.
        route: the rungs that routers choose from, dearest first.
        high: policy that always acts in the dearest of them.
        low: policy that always acts in the cheapest of them.
        headline: router that was chosen on validation. Its tests against random at its ratio, the policy PLANNED_BASELINE and the
            best static policy that costs no more are planned, and so are those of every router against its rule, if it has one (a
            baseline that is its variant); they are corrected for their number (Holm). The other rows of `paired` are for
            exploration and not corrected.
        margin: success that the headline may lose against `high`, at most, to be called not worse.
        confidence: of all intervals, in (0, 1); the keys say `ci95` whatever it is.
        bootstrap: resamples of the games.
        seed: of the resamples.

    Returns:
        JSON-ready, numbers rounded to six digits.

    Raises:
        UserError: a column, policy or episode is missing, or appears twice.
    """
    episodes = _checked(episodes, (high, low, headline))
    outcomes = _outcomes(episodes)
    names = sorted(outcomes, key=lambda name: (_KIND_ORDER[outcomes[name].kind], name != high, name != low, name))
    weights = game_weights(episodes["task_id"].n_unique(), bootstrap, seed)

    graded = not episodes["reward"].is_in([0.0, 1.0]).all()

    static = [outcomes[name] for name in names if outcomes[name].kind in STATIC]
    policies: dict[str, PolicyMetrics] = {}
    for name in names:
        rows = episodes.filter(pl.col("policy") == name)
        policies[name] = _policy_metrics(rows, route, outcomes[name], static, weights, confidence, seed, graded)
        if outcomes[name].kind != "single":
            recovered, recovered_ci = gap_recovered(
                outcomes[name].success, outcomes[high].success, outcomes[low].success, weights, confidence
            )
            policies[name]["gap_recovered"] = recovered
            policies[name]["gap_ci95"] = recovered_ci
    hull, off_hull = _hull(policies)

    router_curve = _curve(policies, high, low, "router")
    metrics: Metrics = {
        "recipe": recipe,
        "route": list(route),
        "high": high,
        "low": low,
        "headline": headline,
        "confidence": confidence,
        "gap": _gap(outcomes[high], outcomes[low], weights, confidence),
        "policies": policies,
        "hull": hull,
        "below_hull": off_hull,
        "non_inferiority": _non_inferiority(outcomes[headline], outcomes[high], margin, confidence),
        "paired": _paired(names, outcomes, high, headline, weights, confidence),
        "apgr": router_curve["apgr"],
        "cpt50": router_curve["cpt50"],
        "cpt80": router_curve["cpt80"],
        "aiq": router_curve["aiq"],
        "random_curve": _curve(policies, high, low, "random"),
    }
    return cast(Metrics, rounded(metrics))


class PairedSuccess(NamedTuple):
    """Of one policy minus another, on the same games."""

    difference: float
    low: float
    high: float
    wins: int
    """Games that it solves more often."""
    losses: int


def compare_policies(episodes: pl.DataFrame, policy: str, against: str, confidence: float) -> PairedSuccess:
    """Success, six decimals, with the interval that a non-inferiority test looks at. Arguments and errors as in
    `compute_metrics`."""
    outcomes = _outcomes(_checked(episodes, (policy, against)))
    first, second = outcomes[policy].success, outcomes[against].success
    low, high = paired_interval(first, second, confidence)
    return PairedSuccess(
        difference=round(float(first.mean() - second.mean()), 6),
        low=round(low, 6),
        high=round(high, 6),
        wins=int((first > second).sum()),
        losses=int((first < second).sum()),
    )


def game_weights(games: int, resamples: int, seed: int) -> Floats:
    """Bootstrap resamples of the games as weights [resamples, games]: how often a game was drawn / number of games.

    A resample's mean of a number x per game is `weights @ x`; the same weights for all policies keep them paired.
    """
    draws = np.random.default_rng(seed).multinomial(games, np.full(games, 1 / games), size=resamples)
    return draws.astype(np.float64) / games


def success_interval(success: Floats, draws: int, weights: Floats, confidence: float) -> Interval:
    """Interval of a policy's success from its rates per game [games]; see the module for which method is used when."""
    if draws == 1:
        return wilson(float(success.mean()), success.size, confidence)
    return mean_interval(success, weights, confidence)


def mean_interval(values: Floats, weights: Floats, confidence: float) -> Interval:
    """Percentile bootstrap interval of the mean of numbers in [0, 1], one a game; Wilson's where the games do not vary."""
    if np.ptp(values) == 0:
        return wilson(float(values.mean()), values.size, confidence)
    return percentiles(weights @ values, confidence)


def gap_recovered(
    success: Floats, high: Floats, low: Floats, weights: Floats, confidence: float
) -> tuple[float | None, Interval | None]:
    """Performance gap recovered (RouteLLM's PGR), (s - low) / (high - low), with its paired bootstrap interval.

    Above 1 means better than always-high, below 0 worse than always-low. Resamples in which high is not above low have
    no gap to recover and are left out; `Gap.resamples_without_gap` says how many. Where the games themselves show no
    gap: (None, None).

    Args:
        success, high, low: success per game [games], same order.
        weights: resamples [resamples, games].
        confidence: of the interval.
    """
    gap = float(high.mean() - low.mean())
    if gap <= 0:
        return None, None
    gaps = weights @ (high - low)
    usable = gaps > 1e-12  # float noise around a gap of exactly zero
    ratios = (weights @ (success - low))[usable] / gaps[usable]
    return float(success.mean() - low.mean()) / gap, percentiles(ratios, confidence)


def average_gap_recovered(points: Points) -> float:
    """RouteLLM's APGR: area under gap recovered against high-precision ratio.

    The curve is piecewise linear from (0, 0), always-low, through the points to (1, 1), always-high.
    """
    ratios, recovered = _routing_curve(points)
    return float(np.trapezoid(recovered, ratios))


def call_performance_threshold(points: Points, target: float) -> float:
    """RouteLLM's CPT: the smallest high-precision ratio at which it recovers `target`, in (0, 1], of the gap."""
    ratios, recovered = _routing_curve(points)
    k = int(np.argmax(recovered >= target - _NOISE))  # 1 or more, since the curve begins at (0, 0)
    share = min(1.0, (target - recovered[k - 1]) / (recovered[k] - recovered[k - 1]))
    return float(ratios[k - 1] + share * (ratios[k] - ratios[k - 1]))


def average_improvement_in_quality(points: Points, cheapest: float, dearest: float) -> float:
    """RouterBench's AIQ: mean success between two costs, on the points' non-decreasing convex hull.

    Mixing two policies at random reaches every point between them, so the hull is what the policies offer together.

    Args:
        points: (cost, success); one of them at or below `cheapest`.
        cheapest, dearest: costs between which the mean is taken, cheapest < dearest.
    """
    costs, successes = rising_hull(*np.asarray(points, dtype=np.float64).T)
    grid = np.array([cheapest, *costs[(cheapest < costs) & (costs < dearest)], dearest])
    return float(np.trapezoid(np.interp(grid, costs, successes), grid) / (dearest - cheapest))


def _checked(episodes: pl.DataFrame, needed: Sequence[str]) -> pl.DataFrame:
    """The episodes' known columns, sorted, after the checks that all numbers rest on."""
    if missing := [name for name in EPISODES.names() if name not in episodes.columns]:
        raise UserError(f"episodes: missing columns: {', '.join(missing)}")
    episodes = episodes.select(EPISODES.names()).cast(EPISODES).sort("policy", "draw", "task_id")
    if empty := [name for name, count in episodes.null_count().row(0, named=True).items() if count]:
        raise UserError(f"episodes: missing values in {', '.join(empty)}")
    if absent := [name for name in needed if name not in episodes["policy"]]:
        raise UserError(
            f"episodes: no policy {', '.join(map(repr, absent))}; there are {sorted(set(episodes['policy']))}"
        )
    if unknown := sorted(set(episodes["kind"]) - set(_KIND_ORDER)):
        raise UserError(f"episodes: unknown kind {', '.join(unknown)}; use one of {', '.join(_KIND_ORDER)}")
    if episodes.select("policy", "draw", "task_id").is_duplicated().any():
        raise UserError("episodes: a (policy, draw, task_id) appears twice")
    possible = (
        pl.col("steps").gt(0)
        & pl.col("high_steps").is_between(0, pl.col("steps"))
        & pl.col("steps_at").list.sum().is_between(0, pl.col("steps"))
        & pl.col("spend").is_between(0, pl.col("steps"))
        & pl.col("bits").gt(0)
        & pl.col("tokens").gt(0)
        & pl.col("high_tokens").is_between(0, pl.col("tokens"))
        & pl.col("passes").gt(0)
        & pl.col("accepted").is_between(0, pl.col("drafted"))
        & pl.col("reward").is_between(0, 1)
        & (pl.col("reward").eq(1) == pl.col("success"))
        & pl.col("cost").is_finite()
        & pl.col("cost_cache").is_between(0, pl.col("cost"))
        & pl.sum_horizontal(FAILURES).is_between(0, pl.col("steps"))
    )
    if (impossible := episodes.filter(~possible)).height:
        name, game = impossible.select("policy", "task_id").row(0)
        raise UserError(
            f"episodes: impossible steps, tokens, cost or reward, first for policy {name!r} on game {game!r}"
        )
    games = episodes["task_id"].n_unique()
    for (name,), rows in episodes.group_by("policy", maintain_order=True):
        if rows.height != rows["draw"].n_unique() * games:
            raise UserError(f"episodes: policy {name!r} lacks episodes; each of its draws must play all {games} games")
    return episodes


def _outcomes(episodes: pl.DataFrame) -> dict[str, _Outcomes]:
    outcomes = {}
    for (name,), rows in episodes.group_by("policy", maintain_order=True):
        games = rows.group_by("task_id").agg(pl.mean("success", "reward", "cost", "cost_cache")).sort("task_id")
        outcomes[str(name)] = _Outcomes(
            kind=cast(Kind, rows["kind"][0]),
            variant_of=rows["variant_of"][0],
            draws=rows["draw"].n_unique(),
            success=games["success"].to_numpy(),
            reward=games["reward"].to_numpy(),
            cost=games["cost"].to_numpy(),
            cost_cache=games["cost_cache"].to_numpy(),
        )
    return outcomes


def _policy_metrics(
    rows: pl.DataFrame,
    route: Sequence[str],
    outcomes: _Outcomes,
    static: Sequence[_Outcomes],
    weights: Floats,
    confidence: float,
    seed: int,
    graded: bool,
) -> PolicyMetrics:
    """A policy's numbers, without the gap recovered; the score where rewards are graded."""
    gain, gain_ci = _gain_at_equal_cost(outcomes, static, weights, confidence)
    successes = _total(rows, "success")
    by_type: dict[str, TaskTypeMetrics] = {}
    for (task_type,), part in rows.sort("task_type").group_by("task_type", maintain_order=True):
        games = part.group_by("task_id").agg(pl.mean("success", "reward")).sort("task_id")
        success, reward = games["success"].to_numpy(), games["reward"].to_numpy()
        part_weights = game_weights(success.size, weights.shape[0], seed)
        of_type: TaskTypeMetrics = {
            "n": success.size,
            "success": float(success.mean()),
            "ci95": success_interval(success, outcomes.draws, part_weights, confidence),
            "high_ratio": _total(part, "high_steps") / _total(part, "steps"),
        }
        if graded:
            of_type["score"] = float(reward.mean())
            of_type["score_ci95"] = mean_interval(reward, part_weights, confidence)
        by_type[str(task_type)] = of_type
    metrics: PolicyMetrics = {
        "kind": outcomes.kind,
        "success": float(outcomes.success.mean()),
        "ci95": success_interval(outcomes.success, outcomes.draws, weights, confidence),
        "high_ratio": _total(rows, "high_steps") / _total(rows, "steps"),
        "token_high_ratio": _total(rows, "high_tokens") / _total(rows, "tokens"),
        "shares": shares_of_steps(rows, route),
        "spend": _total(rows, "spend") / _total(rows, "steps"),
        "mean_bits": _total(rows, "bits") / _total(rows, "steps"),
        "cost": float(outcomes.cost.mean()),
        "cost_ci95": percentiles(weights @ outcomes.cost, confidence),
        "cost_cache": float(outcomes.cost_cache.mean()),
        "cost_per_success": _total(rows, "cost") / successes if successes else None,
        "tokens": _total(rows, "tokens") / rows.height,
        "steps": _total(rows, "steps") / rows.height,
        "acting_passes": _total(rows, "passes") / _total(rows, "steps"),
        "switches": _total(rows, "switches") / rows.height,
        "parse_failures": sum(_total(rows, failure) for failure in PARSE_FAILURES) / _total(rows, "steps"),
        "failures": {failure: _total(rows, failure) / _total(rows, "steps") for failure in FAILURES},
        "n": outcomes.success.size,
        "episodes": rows.height,
        "by_task_type": by_type,
        "gain_at_equal_cost": gain,
        "gain_ci95": gain_ci,
    }
    if drafted := _total(rows, "drafted"):
        metrics["accepted"] = _total(rows, "accepted") / drafted
    if graded:
        metrics["score"] = float(outcomes.reward.mean())
        metrics["score_ci95"] = mean_interval(outcomes.reward, weights, confidence)
    return metrics


def _gain_at_equal_cost(
    policy: _Outcomes, static: Sequence[_Outcomes], weights: Floats, confidence: float
) -> tuple[float, Interval]:
    """Success over what static policies and mixtures of their whole episodes reach at the policy's cost (`best_mixture`).

    The hull is drawn anew in each resample, from the rungs that are lucky in it: where several are close, the interval leans
    against the policy.
    """
    games = weights.shape[1]
    means = np.vstack([np.full(games, 1 / games), weights])  # the games themselves, then the resamples

    def mean_of(values: Floats) -> Floats:
        return cast(Floats, np.round(means @ values, 12))  # equal costs must not differ by float noise

    costs = np.stack([mean_of(one.cost) for one in static], axis=-1)
    successes = np.stack([mean_of(one.success) for one in static], axis=-1)
    gains = mean_of(policy.success) - best_mixture(costs, successes, mean_of(policy.cost))
    return float(gains[0]), percentiles(gains[1:], confidence)


def _hull(policies: Mapping[str, PolicyMetrics]) -> tuple[list[HullPoint], dict[str, str]]:
    """Static policies on the hull, from the cheapest, and those below it (see `below_hull`)."""
    points = {
        name: (policy["cost"], policy["success"]) for name, policy in policies.items() if policy["kind"] in STATIC
    }
    below = below_hull(points)
    hull: list[HullPoint] = [
        {"policy": name, "cost": cost, "success": success}
        for name, (cost, success) in sorted(points.items(), key=lambda item: item[1])
        if name not in below
    ]
    return hull, below


def _gap(high: _Outcomes, low: _Outcomes, weights: Floats, confidence: float) -> Gap:
    gaps = weights @ (high.success - low.success)
    return {
        "difference": float(high.success.mean() - low.success.mean()),
        "ci95": percentiles(gaps, confidence),
        "resamples_without_gap": float((gaps <= 1e-12).mean()),
    }


def _paired(
    names: Sequence[str],
    outcomes: Mapping[str, _Outcomes],
    high: str,
    headline: str,
    weights: Floats,
    confidence: float,
) -> list[PairedComparison]:
    """The planned comparisons, with Holm's p-values; the headline's others, those of the other routers, and the routers with
    one another."""
    routers = sorted((name for name in names if outcomes[name].kind == "router"), key=lambda name: name != headline)
    planned = [(headline, other) for other in _planned_against(headline, names, outcomes)]
    planned += [(router, rule) for router in routers[1:] for rule in _rule_of(router, names, outcomes)]
    others = [(router, other) for router in routers for other in _against(router, names, outcomes, high)]
    pairs = list(dict.fromkeys([*planned, *others, *combinations(routers, 2)]))
    rows = [_paired_comparison(policy, against, outcomes, weights, confidence) for policy, against in pairs]
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows[: len(planned)]]), strict=False):
        row["p_holm"] = adjusted
    return rows


def _planned_against(router: str, names: Sequence[str], outcomes: Mapping[str, _Outcomes]) -> list[str]:
    """What a router has to beat: random at its ratio, the cascade, the best rule that costs no more, chosen on
    validation games, and the best static policy that costs no more. Which one that is, is seen on the same games, to its favour
    and against the router."""
    random = [name for name in names if outcomes[name].kind == "random" and outcomes[name].variant_of == router]
    static = _best_static_within(outcomes[router].cost.mean(), names, outcomes)
    cascade = [PLANNED_BASELINE] if PLANNED_BASELINE in names else []
    return [*random, *cascade, *_rule_of(router, names, outcomes), *([static] if static else [])]


def _rule_of(router: str, names: Sequence[str], outcomes: Mapping[str, _Outcomes]) -> list[str]:
    return [name for name in names if outcomes[name].kind == "baseline" and outcomes[name].variant_of == router]


def _against(router: str, names: Sequence[str], outcomes: Mapping[str, _Outcomes], high: str) -> list[str]:
    """As `_planned_against`, always-high and its other variants."""
    variants = [name for name in names if outcomes[name].variant_of == router]
    return list(dict.fromkeys([*_planned_against(router, names, outcomes), high, *variants]))


def _non_inferiority(policy: _Outcomes, against: _Outcomes, margin: float, confidence: float) -> NonInferiority:
    lower, _ = paired_interval(policy.success, against.success, confidence)
    needed = games_needed(margin, confidence)
    return {
        "margin": margin,
        "lower": lower,
        "games_needed": needed,
        "shown": lower > -margin and policy.success.size >= needed,
    }


def _best_static_within(cost: float, names: Sequence[str], outcomes: Mapping[str, _Outcomes]) -> str | None:
    """The static policy with the highest success of those whose mean cost is `cost` or less, of equals the cheapest."""
    within = [name for name in names if outcomes[name].kind in STATIC and outcomes[name].cost.mean() <= cost]
    return max(within, key=lambda name: (outcomes[name].success.mean(), -outcomes[name].cost.mean()), default=None)


def _paired_comparison(
    policy: str, against: str, outcomes: Mapping[str, _Outcomes], weights: Floats, confidence: float
) -> PairedComparison:
    """Where the two agree on every game the bootstrap has nothing to resample: [0, 0], and the counts show why."""
    first, second = outcomes[policy], outcomes[against]
    draws = math.lcm(first.draws, second.draws)
    signs = np.sign(np.rint((first.success - second.success) * draws))
    return {
        "policy": policy,
        "against": against,
        "difference": float(first.success.mean() - second.success.mean()),
        "ci95": percentiles(weights @ (first.success - second.success), confidence),
        "p_value": paired_p_value(first.success, second.success, first.draws, second.draws),
        "p_holm": None,
        "smallest_difference": smallest_difference(first.success - second.success, 1 - confidence),
        "wins": int((signs > 0).sum()),
        "losses": int((signs < 0).sum()),
        "ties": int((signs == 0).sum()),
        "cost_difference": float(first.cost.mean() - second.cost.mean()),
    }


def _curve(policies: Mapping[str, PolicyMetrics], high: str, low: str, kind: Kind) -> Curve:
    members = [metrics for metrics in policies.values() if metrics["kind"] == kind]
    gap = policies[high]["success"] - policies[low]["success"]
    recovered = [(m["spend"], (m["success"] - policies[low]["success"]) / gap) for m in members] if gap > 0 else None
    # The same span of costs for routers and random, or their means would not compare.
    costs = [m["cost"] for name, m in policies.items() if name in (high, low) or m["kind"] in ("router", "random")]
    points = [(m["cost"], m["success"]) for m in (policies[low], policies[high], *members)]
    cheapest = min(policies[low]["cost"], policies[high]["cost"])
    return {
        "apgr": None if recovered is None else average_gap_recovered(recovered),
        "cpt50": None if recovered is None else call_performance_threshold(recovered, 0.5),
        "cpt80": None if recovered is None else call_performance_threshold(recovered, 0.8),
        "aiq": average_improvement_in_quality(points, cheapest, max(costs)) if max(costs) > cheapest else None,
    }


def _routing_curve(points: Points) -> tuple[Floats, Floats]:
    """Ratios in rising order and the gap recovered there, with both ends."""
    ratios, recovered = np.reshape(np.asarray(points, dtype=np.float64), (-1, 2)).T
    order = np.lexsort((recovered, ratios))
    return np.concatenate([[0.0], ratios[order], [1.0]]), np.concatenate([[0.0], recovered[order], [1.0]])


def shares_of_steps(episodes: pl.DataFrame, route: Sequence[str]) -> dict[str, float]:
    """Routed rung -> its steps / steps, of rows of `EPISODES`; 0 where the policy acted in a rung that is not routed."""
    steps = _total(episodes, "steps")
    return {
        rung: float(episodes["steps_at"].list.get(k, null_on_oob=True).sum()) / steps for k, rung in enumerate(route)
    }


def _total(rows: pl.DataFrame, column: str) -> float:
    return float(rows[column].sum())


def percentiles(values: Floats, confidence: float) -> Interval:
    """The bootstrap's interval: the middle part of the resampled values."""
    lower, upper = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return [float(lower), float(upper)]


def interval_of_known(values: Sequence[float | None], confidence: float) -> Interval | None:
    """Over the resamples that have a number there; half of them at least, or there is none to speak of."""
    numbers = [value for value in values if value is not None]
    return percentiles(np.array(numbers), confidence) if numbers and 2 * len(numbers) >= len(values) else None


def rounded(value: object) -> object:
    """The same JSON with floats at six decimals: what lies below is float noise, which must not change a hash."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, _DIGITS) + 0.0  # no minus zero
    return value
