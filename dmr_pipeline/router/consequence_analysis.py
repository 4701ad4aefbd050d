"""How well what is known at a step predicts that high precision is needed there, by labels of consequence.

Every number has an interval: the games are resampled, with all steps that were played in them (percentiles of the bootstrap).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dmr_pipeline.frozen_model import FrozenModel

Floats = NDArray[np.float64]
Among = Literal["all steps", "actions differ"]

CONFIDENCE = 0.95
RESAMPLES = 1000
LEAST_POSITIVES = 5
"""With fewer nothing is said."""
PREDICTORS: Mapping[str, pl.Expr] = {
    "KL(high||low)": pl.col("kl_high_low"),
    "KL(low||high)": pl.col("kl_low_high"),
    "JS": pl.col("js"),
    "entropy of the draft": pl.col("entropy_low"),
    "1 - margin of the draft": 1 - pl.col("margin_low"),
    "actions differ": (~pl.col("greedy_agree")).cast(pl.Float64),
    "minus the turn": -pl.col("turn").cast(pl.Float64),
    "router's probability": pl.col("probability"),
}
"""Of each, the larger the likelier should high precision be needed."""
_TURNS = ((0, 4), (5, 14), (15, None))
"""First and last."""


class Estimate(FrozenModel):
    value: float
    low: float
    high: float
    """Ends of the interval."""


class Prediction(FrozenModel):
    """How well one number predicts."""

    predictor: str
    auroc: Estimate
    """Chance that a needed step has more of it than another one."""
    average_precision: Estimate
    """Of a predictor that knows nothing it is the share of needed steps."""
    rank_correlation: Estimate
    """Spearman's, with high's success minus low's: 1 where needed, -1 where harmful, 0 where neutral."""


class Part(FrozenModel):
    """Some of the steps, under one continuation."""

    continuation: str
    precision: str
    """The cheaper rung."""
    among: Among
    where: str
    """`everywhere`, some turns or a task type."""
    steps: int
    needed: int
    harmful: int
    refusal: str | None = None
    """Why nothing can be said."""
    predictions: Sequence[Prediction] = ()


class OneSwap(FrozenModel):
    """What an oracle by consequence wins that knows one step a game to swap: where the cheapest rung plays and goes on, of the
    games that it loses those that it wins with one step at the dearest. With more swaps more may be won: it is where its curve
    begins."""

    games: int
    won: Estimate
    """Share of the games, without a swap."""
    won_with_one: Estimate
    ratio: float
    """Steps that are swapped for that, as a share of all steps that were played."""


def one_swap(table: pl.DataFrame, seed: int, resamples: int = RESAMPLES) -> OneSwap | None:
    """Arguments as of `analyse`; None where the cheapest rung did not play and go on."""
    low = table.filter(policy="low", continuation="low")
    if low.is_empty():
        return None
    games = low.group_by("task_id", maintain_order=True).agg(
        won=pl.col("success").first(), saved=pl.col("high_success").any(), steps=pl.col("turn").n_unique()
    )
    weights = np.random.default_rng(seed).multinomial(len(games), np.full(len(games), 1 / len(games)), resamples)
    won, saved = games["won"].to_numpy(), games["saved"].to_numpy()

    def share(of: NDArray[np.bool_]) -> Estimate:
        return _estimate(lambda counts: counts @ of / counts.sum(1), weights.astype(np.float64))

    return OneSwap(
        games=len(games),
        won=share(won),
        won_with_one=share(won | saved),
        ratio=float((saved & ~won).sum() / games["steps"].sum()),
    )


def analyse(table: pl.DataFrame, seed: int, resamples: int = RESAMPLES) -> list[Part]:
    """
    Args:
        table: rows of `consequence.CONSEQUENCES`.
        seed: of the resampling.
    """
    games = table["task_id"].unique().sort()
    counts = np.random.default_rng(seed).multinomial(len(games), np.full(len(games), 1 / len(games)), resamples)
    place = dict(zip(games, range(len(games)), strict=True))
    parts = []
    for (continuation, precision), rows in table.group_by("continuation", "precision", maintain_order=True):
        differing = rows.filter(~pl.col("greedy_agree"))
        those: Mapping[Among, pl.DataFrame] = {"all steps": rows, "actions differ": differing}
        for among, some in those.items():
            for where, condition in _places(rows):
                part = some.filter(condition)
                weights = counts[:, [place[game] for game in part["task_id"]]].astype(np.float64)
                refusal = _refusal(part)
                parts.append(
                    Part(
                        continuation=str(continuation),
                        precision=str(precision),
                        among=among,
                        where=where,
                        steps=len(part),
                        needed=_count(part, "needed"),
                        harmful=_count(part, "harmful"),
                        refusal=refusal,
                        predictions=() if refusal else _predictions(part, weights),
                    )
                )
    return parts


def _places(rows: pl.DataFrame) -> list[tuple[str, pl.Expr]]:
    turn = pl.col("turn")
    by_turn = [
        (f"from turn {first}" if last is None else f"turns {first}-{last}", turn.is_between(first, last or 10**9))
        for first, last in _TURNS
    ]
    by_type = [(kind, pl.col("task_type") == kind) for kind in rows["task_type"].unique().sort()]
    return [("everywhere", pl.lit(True)), *by_turn, *by_type]


def _count(part: pl.DataFrame, label: str) -> int:
    return int((part["label"] == label).sum())


def _refusal(part: pl.DataFrame) -> str | None:
    needed = _count(part, "needed")
    if min(needed, len(part) - needed) >= LEAST_POSITIVES:
        return None
    return (
        f"high precision is needed at {needed} of {len(part)} steps: less than {LEAST_POSITIVES} of a kind say nothing"
    )


def _predictions(part: pl.DataFrame, weights: Floats) -> list[Prediction]:
    """Of all predictors that are known there and not the same everywhere.

    Args:
        weights: [resamples, steps], how often each is there.
    """
    needed = (part["label"] == "needed").to_numpy()
    effect = needed.astype(np.float64) - (part["label"] == "harmful").to_numpy()
    predictions = []
    for name, expression in PREDICTORS.items():
        scores = part.select(expression).to_series()
        if scores.null_count() or scores.n_unique() == 1:
            continue
        s = scores.to_numpy()
        predictions.append(
            Prediction(
                predictor=name,
                auroc=_estimate(partial(weighted_auroc, s, needed), weights),
                average_precision=_estimate(partial(weighted_average_precision, s, needed), weights),
                rank_correlation=_estimate(partial(weighted_rank_correlation, s, effect), weights),
            )
        )
    return predictions


def _estimate(statistic: Callable[[Floats], Floats], weights: Floats) -> Estimate:
    """On the rows as they are, and the interval of the resamples in which it is defined."""
    value = float(statistic(np.ones((1, weights.shape[1])))[0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(statistic(weights), [tail, 1 - tail]).tolist()
    return Estimate(value=value, low=low, high=high)


def weighted_auroc(scores: Floats, labels: NDArray[np.bool_], weights: Floats) -> Floats:
    """Chance that a positive scores above a negative, ties counting half; NaN where there are none of one kind.

    Args:
        scores, labels: [rows].
        weights: [resamples, rows], how often each row is there.

    Returns:
        [resamples].
    """
    groups = _Groups(scores)
    positives, negatives = groups.sums(weights * labels), groups.sums(weights * ~labels)
    below = negatives.cumsum(1) - negatives
    return _share((positives * (below + negatives / 2)).sum(1), positives.sum(1) * negatives.sum(1))


def weighted_average_precision(scores: Floats, labels: NDArray[np.bool_], weights: Floats) -> Floats:
    """Precision at each distinct score as threshold, weighted by the recall that it adds. Arguments as of `weighted_auroc`."""
    groups = _Groups(-scores)
    positives, all_there = groups.sums(weights * labels), groups.sums(weights)
    precision = positives.cumsum(1) / np.maximum(all_there.cumsum(1), 1)
    return _share((positives * precision).sum(1), positives.sum(1))


def weighted_rank_correlation(first: Floats, second: Floats, weights: Floats) -> Floats:
    """Spearman's: Pearson's of the ranks, those of ties being their mean. Arguments as of `weighted_auroc`."""
    total = weights.sum(1, keepdims=True)
    centred = []
    for values in (first, second):
        groups = _Groups(values)
        counts = groups.sums(weights)
        ranks = (counts.cumsum(1) - counts + (counts + 1) / 2)[:, groups.of_row]
        centred.append(ranks - (total + 1) / 2)
    one, other = centred
    spread = (weights * one**2).sum(1) * (weights * other**2).sum(1)
    return _share((weights * one * other).sum(1), np.sqrt(spread))


class _Groups:
    """Rows of equal values, the smallest first."""

    def __init__(self, values: Floats) -> None:
        self.order = np.argsort(values, kind="stable")
        first = np.append(True, np.diff(values[self.order]) != 0)
        self.starts = np.flatnonzero(first)
        self.of_row = np.empty(len(values), np.int64)
        """Number of each row's group."""
        self.of_row[self.order] = first.cumsum() - 1

    def sums(self, weights: Floats) -> Floats:
        """[resamples, rows] -> [resamples, groups]."""
        summed: Floats = np.add.reduceat(weights[:, self.order], self.starts, axis=1)
        return summed


def _share(part: Floats, whole: Floats) -> Floats:
    """NaN where there is no whole."""
    shares: Floats = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    return shares
