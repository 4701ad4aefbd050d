"""How good predicted probabilities are, and how to make them so."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import mannwhitneyu

from dmr_pipeline.rollout.trajectory import Trajectory

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]
Classes = NDArray[np.int64]

ROLLOUTS = 5
"""Of a search for one spend."""
_CLOSE_ENOUGH = 0.01
"""Spend, on both sides of what is aimed at."""


def by_rung(scores: Floats) -> Floats:
    """Scores [rungs, steps], cheapest first, from those of all rungs but the cheapest, whose score is 0: [steps, rungs - 1]."""
    return np.concatenate([np.zeros((1, len(scores))), scores.T])


def rest_of(s: Floats, k: int) -> Floats:
    """Log of the summed exponentials of all scores [rungs, steps] but one rung's: that one against the rest is the softmax, and
    of two rungs a sigmoid."""
    rest: Floats = np.logaddexp.reduce(np.delete(s, k, axis=0))
    return rest


def shares(s: Floats) -> Floats:
    """Probabilities of all rungs but the first, [rungs - 1, steps], by the softmax of scores [rungs, steps]."""
    return np.stack([expit(s[k] - rest_of(s, k)) for k in range(1, len(s))])


def exceedances(scores: Floats) -> Floats:
    """`Decision.exceedance` [steps, rungs - 1], dearest first, from scores as `by_rung` takes them."""
    s = by_rung(scores)
    above = [expit(np.logaddexp.reduce(s[k:]) - np.logaddexp.reduce(s[:k])) for k in range(1, len(s))]
    return np.stack(above[::-1], axis=1)


def chances(levels: Floats) -> Floats:
    """Of each rung to act, [..., rungs], dearest first, from `Decision.exceedance` [..., rungs - 1]."""
    result: Floats = np.diff(levels, prepend=0.0, append=1.0)
    return result


def platt(margins: Floats, classes: Classes) -> tuple[float, list[float]]:
    """Scale a and offsets b_k of softmax(0, a * margin_k + b_k ...), by maximum likelihood (Platt, 1999; for any number of
    classes Guo et al., 2017, with one scale for all).

    As in Platt's paper the targets are (n_c + 1) / (n_c + K) for a step's own class c and 1 / (n_c + K) for each other of the K
    instead of 1 and 0, which keeps the scale finite where the margins separate the classes.

    Args:
        margins: [steps, classes - 1], of all classes but the first against the first.
        classes: [steps], from 0.
    """
    steps, others = margins.shape
    sizes = np.bincount(classes, minlength=others + 1)[classes]
    own = classes == np.arange(1, others + 1)[:, None]
    targets = np.where(own, (sizes + 1) / (sizes + others + 1), 1 / (sizes + others + 1))
    ones = np.eye(others)
    designs = [np.stack([margins[:, k], *(np.full(steps, one) for one in ones[k])]) for k in range(others)]
    """Of each class but the first, [parameters, steps]."""

    def scores(parameters: Floats) -> Floats:
        return np.stack([np.zeros(steps), *(parameters @ design for design in designs)])

    def loss(parameters: Floats) -> float:
        s = scores(parameters)
        return float(np.mean(np.logaddexp.reduce(s) - (targets * s[1:]).sum(0)))

    def gradient(parameters: Floats) -> Floats:
        p = shares(scores(parameters))
        slopes = [design @ (mine - target) for design, mine, target in zip(designs, p, targets, strict=True)]
        slope: Floats = sum(slopes[1:], slopes[0]) / steps
        return slope

    def hessian(parameters: Floats) -> Floats:
        p = shares(scores(parameters))
        curvatures = [
            (designs[j] * (p[j] * ((j == k) - p[k]))) @ designs[k].T for j in range(others) for k in range(others)
        ]
        curvature: Floats = sum(curvatures[1:], curvatures[0]) / steps
        return curvature

    start = np.array([1.0, *[0.0] * others])
    scale, *offsets = minimize(loss, start, jac=gradient, hess=hessian, method="trust-exact").x.tolist()
    return scale, offsets


def auroc(scores: Floats, labels: Labels) -> float:
    """Chance that a positive scores above a negative, ties counting half."""
    positives, negatives = scores[labels], scores[~labels]
    u = mannwhitneyu(positives, negatives, method="asymptotic").statistic
    return float(u / (len(positives) * len(negatives)))


def auprc(scores: Floats, labels: Labels) -> float:
    """Average precision: precision at each distinct score as threshold, weighted by the recall it adds."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each run of equal scores
    found = np.cumsum(labels[order])[last]
    precision = found / (np.flatnonzero(last) + 1)
    return float(np.sum(np.diff(found, prepend=0) * precision) / labels.sum())


def brier(probabilities: Floats, labels: Labels) -> float:
    """Mean squared error of the probabilities."""
    return float(np.mean((probabilities - labels) ** 2))


def expected_calibration_error(probabilities: Floats, labels: Labels, bins: int = 10) -> float:
    """Mean gap between predicted and observed share over bins of equal count, weighted by their counts."""
    groups = np.array_split(np.argsort(probabilities, kind="stable"), bins)
    return float(sum(abs(np.sum(probabilities[group] - labels[group])) for group in groups) / len(labels))


@dataclass(frozen=True)
class OperatingPoint:
    """A policy at one threshold, in closed loop."""

    threshold: float
    spend: float
    """Mean over all steps, see `ActingModels.spend`."""
    success: float
    """Share of the episodes."""
    steps: int

    @classmethod
    def of(cls, threshold: float, played: Sequence[Trajectory], spend: Mapping[str, float]) -> "OperatingPoint":
        spent = [spend[step.precision] for trajectory in played for step in trajectory.steps]
        success = [trajectory.success for trajectory in played]
        return cls(threshold, sum(spent) / len(spent), sum(success) / len(success), len(spent))


@dataclass
class FalsePosition:
    """The Illinois method: where a spend that falls with the quantile of the levels comes to what is aimed at. Each end is
    a quantile, and what the spend is off by there."""

    left: float
    too_high: float
    right: float
    too_low: float
    _last: float = 0.0

    @classmethod
    def over_all(cls, aim: float) -> "FalsePosition":
        """Everything is above the quantile 0, nothing above 1."""
        return cls(0.0, 1.0 - aim, 1.0, -aim)

    @property
    def quantile(self) -> float:
        """Where to look next."""
        return self.left + (self.right - self.left) * self.too_high / (self.too_high - self.too_low)

    def narrow(self, quantile: float, gap: float) -> None:
        """
        Args:
            gap: what the spend is off by there.
        """
        same_side, self._last = gap * self._last > 0, gap
        if gap > 0:
            self.left, self.too_high, self.too_low = quantile, gap, self.too_low / 2 if same_side else self.too_low
        else:
            self.right, self.too_low, self.too_high = quantile, gap, self.too_high / 2 if same_side else self.too_high


def find_threshold(
    play_at: Callable[[float], OperatingPoint], levels: Floats, target: float
) -> tuple[OperatingPoint, list[OperatingPoint]]:
    """The threshold whose closed-loop spend is the largest that is at most the target, and all that were tried.

    The spend in closed loop does not follow from the `levels` (the exceedances, open loop) above the threshold, since a router
    changes which states it meets. False position (Illinois) over their quantiles, at most 5 rollouts, aims a hundredth below the
    target and is content up to that; the open-loop threshold comes first. If all 5 spend more than the target, one above all
    levels is tried, where only what is forced is spent; what spends least is then taken, and says itself what it spends.
    """
    tolerance = min(_CLOSE_ENOUGH, target / 2)
    aim = target - tolerance
    search, tried = FalsePosition.over_all(aim), list[OperatingPoint]()
    while len(tried) < ROLLOUTS:
        quantile = search.quantile
        point = play_at(float(np.quantile(levels, quantile)))
        tried.append(point)
        if target - 2 * tolerance <= point.spend <= target:
            break
        search.narrow(quantile, point.spend - aim)
    if all(point.spend > target for point in tried):
        tried.append(play_at(min(1.0, float(np.nextafter(levels.max(), np.inf)))))
    within = [point for point in tried if point.spend <= target]
    if not within:
        return min(tried, key=lambda point: point.spend), tried
    return max(within, key=lambda point: point.spend), tried
