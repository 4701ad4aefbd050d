"""What the curves of routers and rules say: success, ratio, cost and gain of each point, the field's numbers of the whole curve.

Intervals as in metrics.py: percentile bootstrap over games, everything resampled together; Wilson's for the success of a point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import polars as pl

from dmr_pipeline.evaluation.metrics import (
    average_gap_recovered,
    average_improvement_in_quality,
    call_performance_threshold,
    game_weights,
    interval_of_known,
    percentiles,
    rounded,
    success_interval,
)
from dmr_pipeline.evaluation.results import STATIC, CurvePoint, PolicyCurve
from dmr_pipeline.precision.hull import Floats, best_mixture

_NO_GAP = 1e-12


@dataclass(frozen=True)
class _Games:
    """Means over the games, and over each resample of them: [1 + resamples]."""

    success: Floats
    cost: Floats
    spend: Floats


def curves_of(
    curves: pl.DataFrame,
    settings: pl.DataFrame,
    episodes: pl.DataFrame,
    *,
    high: str,
    low: str,
    confidence: float,
    bootstrap: int,
    seed: int,
) -> dict[str, PolicyCurve]:
    """Numbers of each curve, by its name, rounded to six digits.

    Args:
        curves: rows of `curves.CURVES`, each policy on all games under each budget.
        settings: rows of `curves.SETTINGS`.
        episodes: rows of `metrics.EPISODES` on the same games; of them the static policies are taken.
        high, low: as in `metrics.compute_metrics`, like the others.
    """
    games = episodes["task_id"].n_unique()
    weights = game_weights(games, bootstrap, seed)
    means = np.vstack([np.full(games, 1 / games), weights])
    static = {
        str(name): _means(rows, means)
        for (name,), rows in episodes.filter(pl.col("kind").is_in(STATIC)).group_by("policy", maintain_order=True)
    }
    costs, successes = (np.stack([getattr(s, what) for s in static.values()], -1) for what in ("cost", "success"))
    gap = static[high].success - static[low].success

    by_policy: dict[str, dict[float, _Games]] = {}
    for (policy, budget), rows in curves.group_by("policy", "budget", maintain_order=True):
        by_policy.setdefault(str(policy), {})[cast(float, budget)] = _means(rows, means)
    ends = [static[high], static[low]]
    everything = [*ends, *(point for points in by_policy.values() for point in points.values())]
    cheapest, dearest = np.minimum(*(end.cost for end in ends)), np.max([one.cost for one in everything], axis=0)

    found: dict[str, PolicyCurve] = {}
    for policy, points in by_policy.items():
        gains = [one.success - best_mixture(costs, successes, one.cost) for one in points.values()]
        shown: list[CurvePoint] = []
        for (budget, one), gain in zip(points.items(), gains, strict=True):
            rows = curves.filter(policy=policy, budget=budget).sort("task_id")
            set_at = settings.filter(policy=policy, budget=budget).row(0, named=True)
            shown.append(
                {
                    "budget": budget,
                    "threshold": set_at["threshold"],
                    "ties": set_at["ties"],
                    "validation_spend": set_at["validation_spend"],
                    "validation_success": set_at["validation_success"],
                    "validation_cost": set_at["validation_cost"],
                    "success": float(one.success[0]),
                    "ci95": success_interval(rows["success"].cast(pl.Float64).to_numpy(), 1, weights, confidence),
                    "spend": float(one.spend[0]),
                    "spend_ci95": percentiles(one.spend[1:], confidence),
                    "cost": float(one.cost[0]),
                    "cost_ci95": percentiles(one.cost[1:], confidence),
                    "gain_at_equal_cost": float(gain[0]),
                    "gain_ci95": percentiles(gain[1:], confidence),
                }
            )
        lines = _lines(list(points.values()), ends[1].success, gap)
        areas = [None if line is None else average_gap_recovered(line) for line in lines]
        first = lines[0]
        offered = [(np.stack([one.cost, one.success], -1)) for one in (*ends, *points.values())]
        qualities = [
            average_improvement_in_quality([tuple(point[i]) for point in offered], cheapest[i], dearest[i])
            if dearest[i] > cheapest[i]
            else None
            for i in range(len(means))
        ]
        mean_gain = np.mean(gains, axis=0)
        found[policy] = {
            "kind": curves.filter(policy=policy)["kind"][0],
            "points": shown,
            "apgr": areas[0],
            "apgr_ci95": interval_of_known(areas[1:], confidence),
            "cpt50": None if first is None else call_performance_threshold(first, 0.5),
            "cpt80": None if first is None else call_performance_threshold(first, 0.8),
            "aiq": qualities[0],
            "aiq_ci95": interval_of_known(qualities[1:], confidence),
            "mean_gain": float(mean_gain[0]),
            "mean_gain_ci95": percentiles(mean_gain[1:], confidence),
        }
    return cast(dict[str, PolicyCurve], rounded(found))


def _means(rows: pl.DataFrame, means: Floats) -> _Games:
    """Of a policy's episodes, one a game; `means` [1 + resamples, games] are weights that sum to 1."""
    rows = rows.sort("task_id")
    success, cost, spend, steps = (
        rows[column].cast(pl.Float64).to_numpy() for column in ("success", "cost", "spend", "steps")
    )
    # Equal means must not differ by float noise.
    return _Games(np.round(means @ success, 12), np.round(means @ cost, 12), (means @ spend) / (means @ steps))


def _lines(points: Sequence[_Games], low: Floats, gap: Floats) -> list[list[tuple[float, float]] | None]:
    """Spend and gap recovered at each point, for the games and each resample; None where there is no gap."""
    usable = np.where(gap > _NO_GAP, gap, np.nan)
    recovered = [(point.success - low) / usable for point in points]
    return [
        [(float(p.spend[i]), float(r[i])) for p, r in zip(points, recovered, strict=True)] if gap[i] > _NO_GAP else None
        for i in range(len(gap))
    ]
