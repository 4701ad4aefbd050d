"""The field's metrics of any router between two models, from a table with a row a query: how good the strong and the weak model's
answer is, and the router's score, higher where the query should go to the strong one.

A threshold on the score gives one point of the router's curve: the share of the queries that go to the strong model (ratio),
the mean quality, the mean cost. Queries of equal score lie on one side of every threshold; between two points a router draws by
lot, so the curve is piecewise linear, and a score that tells nothing is the line of random routing.

    PGR, APGR, CPT   RouteLLM (Ong et al., 2024): share of the gap between the models that is recovered; its mean over all ratios;
                     the least ratio that recovers 50% or 80%. The area is exact where their evaluator takes ten thresholds.
    AIQ              RouterBench (Hu et al., 2024): mean quality between the models' costs on the non-decreasing convex hull.
    QNC              UniRoute (Jitkrittum et al., 2025), quality-neutral cost: the least cost at which the router is as good as
                     the better of the two models, relative to that model's cost.

Intervals: percentile bootstrap over queries. A resample's hull and its best point are picked for their luck in it, so those of
AIQ and QNC lean in the router's favour.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import polars as pl

from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.metrics import (
    average_gap_recovered,
    average_improvement_in_quality,
    call_performance_threshold,
    interval_of_known,
    percentiles,
)
from dmr_pipeline.evaluation.results import Interval
from dmr_pipeline.precision.hull import Floats

COLUMNS = ("query", "strong", "weak", "score")
COSTS = ("strong_cost", "weak_cost")
RATIOS = tuple(round(tenth / 10, 1) for tenth in range(11))
_NOISE = 1e-9


Summary = dict[str, float | None]
"""One router: `apgr`, `cpt50`, `cpt80`, null without a gap between the models (the strong one not better); `aiq`, null where the
strong model costs no more than the weak one; `qnc`, null where the better model costs nothing."""


class CurvePoint(TypedDict):
    ratio: float
    quality: float
    quality_ci95: Interval
    cost: float
    pgr: float | None


class TableMetrics(TypedDict):
    """JSON-ready, numbers rounded to six digits; intervals are [low, high] at `confidence`."""

    queries: int
    confidence: float
    strong: float
    """Mean quality, as the next one."""
    weak: float
    strong_cost: float
    weak_cost: float
    gap_ci95: Interval
    resamples_without_gap: float
    """Share of the resamples in which the strong model is not better; they are left out of the intervals of APGR and CPT."""
    best_quality: float
    """Mean of the better answer to each query: what no router exceeds."""
    router: Summary
    router_ci95: dict[str, Interval | None]
    random: Summary
    oracle: Summary
    """Ranks the queries by strong minus weak: the best quality at every ratio."""
    curve: list[CurvePoint]


class _Curve(NamedTuple):
    """[points] each, from all to the weak model to all to the strong one."""

    ratio: Floats
    quality: Floats
    cost: Floats


def read_table(path: Path) -> pl.DataFrame:
    """`query` (any), `strong`, `weak`, `score`, `strong_cost`, `weak_cost` (float64); costs are 1 and 0 where the file has none.

    Args:
        path: .parquet, .csv or .jsonl.

    Raises:
        UserError: what cannot be read, is missing, appears twice or lies out of range.
    """
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".parquet": pl.read_parquet,
        ".csv": partial(pl.read_csv, infer_schema_length=None),
        ".jsonl": partial(pl.read_ndjson, infer_schema_length=None),
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: a table ends in {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        table = readers[path.suffix](path)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise UserError(
            f"{path}: no column {', '.join(missing)}; a row has {', '.join(COLUMNS)}, and may have both costs"
        )
    if len(given := [name for name in COSTS if name in table.columns]) == 1:
        raise UserError(f"{path}: {given[0]} alone; give {' and '.join(COSTS)}, or neither")
    if not given:
        table = table.with_columns(strong_cost=pl.lit(1.0), weak_cost=pl.lit(0.0))
    for name in (*COLUMNS[1:], *COSTS):
        try:
            table = table.with_columns(pl.col(name).cast(pl.Float64))
        except pl.exceptions.PolarsError as error:
            raise UserError(f"{path}: column {name} holds something that is no number") from error
    table = table.select(*COLUMNS, *COSTS)
    if table.is_empty():
        raise UserError(f"{path}: no rows")
    if table["query"].has_nulls() or table["query"].is_duplicated().any():
        raise UserError(f"{path}: a query is missing or appears twice; average the rows of one query first")
    wanted = {name: pl.col(name).is_finite() for name in (*COLUMNS[1:], *COSTS)}
    wanted |= {name: pl.col(name).is_between(0, 1) for name in ("strong", "weak")}
    wanted |= {name: wanted[name] & (pl.col(name) >= 0) for name in COSTS}
    for name, is_right in wanted.items():
        wrong = table.filter(~is_right.fill_null(False))
        if wrong.height:
            rule = {"strong": "in [0, 1]", "weak": "in [0, 1]", "score": "a finite number"}.get(name, "0 or more")
            raise UserError(
                f"{path}: {name} of query {str(wrong['query'][0])!r} is {wrong[name][0]}; it has to be {rule}"
            )
    return table


def table_metrics(
    table: pl.DataFrame, *, confidence: float = 0.95, bootstrap: int = 2000, seed: int = 0
) -> TableMetrics:
    """All numbers of a table.

    Args:
        table: as `read_table` gives it.
        confidence: of all intervals, in (0, 1).
        bootstrap: resamples of the queries.
        seed: of the resamples.
    """
    table = table.sort("query")
    strong, weak, scores, strong_cost, weak_cost = (table[name].to_numpy() for name in (*COLUMNS[1:], *COSTS))
    values = (strong, weak, strong_cost, weak_cost)
    uniform = np.full(len(scores), 1 / len(scores))
    curve = _curve(scores, *values, uniform)
    ends = _Curve(*(line[[0, -1]] for line in curve))

    generator, n = np.random.default_rng(seed), len(scores)
    summaries: list[Summary] = []
    gaps, qualities = [], []
    for _ in range(bootstrap):
        weights = np.bincount(generator.integers(0, n, n), minlength=n) / n
        resampled = _curve(scores, *values, weights)
        summaries.append(_summary(resampled))
        gaps.append(resampled.quality[-1] - resampled.quality[0])
        qualities.append(np.interp(RATIOS, resampled.ratio, resampled.quality))

    gap = curve.quality[-1] - curve.quality[0]
    router = _summary(curve)
    quality, cost = (np.interp(RATIOS, curve.ratio, line) for line in (curve.quality, curve.cost))
    found: TableMetrics = {
        "queries": n,
        "confidence": confidence,
        "strong": _rounded(curve.quality[-1]),
        "weak": _rounded(curve.quality[0]),
        "strong_cost": _rounded(curve.cost[-1]),
        "weak_cost": _rounded(curve.cost[0]),
        "gap_ci95": _interval(np.array(gaps), confidence),
        "resamples_without_gap": _rounded(float(np.mean(np.array(gaps) <= _NOISE))),
        "best_quality": _rounded(np.maximum(strong, weak).mean()),
        "router": _all_rounded(router),
        "router_ci95": {name: _interval_of(name, summaries, confidence) for name in router},
        "random": _all_rounded(_summary(ends)),
        "oracle": _all_rounded(_summary(_curve(strong - weak, *values, uniform))),
        "curve": [
            {
                "ratio": ratio,
                "quality": _rounded(quality[i]),
                "quality_ci95": _interval(np.array(qualities)[:, i], confidence),
                "cost": _rounded(cost[i]),
                "pgr": _rounded((quality[i] - curve.quality[0]) / gap) if gap > _NOISE else None,
            }
            for i, ratio in enumerate(RATIOS)
        ],
    }
    return found


def _curve(
    scores: Floats, strong: Floats, weak: Floats, strong_cost: Floats, weak_cost: Floats, weights: Floats
) -> _Curve:
    """Of queries [queries] with weights that sum to 1: the highest scores go to the strong model first."""
    order = np.argsort(-scores, kind="stable")
    ends_run = np.append(np.diff(scores[order]) != 0, True)

    def along(start: float, gains: Floats) -> Floats:
        return np.append(start, start + np.cumsum((weights * gains)[order])[ends_run])

    return _Curve(
        ratio=along(0.0, np.ones_like(scores)),
        quality=along(float(weights @ weak), strong - weak),
        cost=along(float(weights @ weak_cost), strong_cost - weak_cost),
    )


def _summary(curve: _Curve) -> Summary:
    low, high = float(curve.quality[0]), float(curve.quality[-1])
    cheap, dear = float(curve.cost[0]), float(curve.cost[-1])
    has_gap = high - low > _NOISE
    gap = high - low if has_gap else 1.0
    recovered = np.column_stack([curve.ratio, (curve.quality - low) / gap])[1:-1]
    points = np.column_stack([curve.cost, curve.quality])
    return {
        "apgr": average_gap_recovered(recovered) if has_gap else None,
        "cpt50": call_performance_threshold(recovered, 0.5) if has_gap else None,
        "cpt80": call_performance_threshold(recovered, 0.8) if has_gap else None,
        "aiq": average_improvement_in_quality(points, cheap, dear) if dear - cheap > _NOISE else None,
        "qnc": _quality_neutral_cost(curve),
    }


def _quality_neutral_cost(curve: _Curve) -> float | None:
    """The least cost on the curve where its quality is that of its better end, relative to that end's cost."""
    best = max((0, -1), key=lambda end: (curve.quality[end], -curve.cost[end]))
    wanted, cost = curve.quality[best] - _NOISE, curve.cost[best]
    if cost <= _NOISE:
        return None
    before, after = curve.quality[:-1], curve.quality[1:]
    crossing = (before < wanted) != (after < wanted)
    share = (wanted - before[crossing]) / (after - before)[crossing]
    crossed = curve.cost[:-1][crossing] + share * np.diff(curve.cost)[crossing]
    return float(min([*crossed, *curve.cost[curve.quality >= wanted]]) / cost)


def _interval_of(name: str, summaries: list[Summary], confidence: float) -> Interval | None:
    found = interval_of_known([summary[name] for summary in summaries], confidence)
    return None if found is None else [_rounded(end) for end in found]


def _interval(values: Floats, confidence: float) -> Interval:
    return [_rounded(end) for end in percentiles(values, confidence)]


def _rounded(value: float) -> float:
    return round(float(value), 6) + 0.0  # no minus zero


def _all_rounded(summary: Summary) -> Summary:
    return {name: None if value is None else _rounded(value) for name, value in summary.items()}
