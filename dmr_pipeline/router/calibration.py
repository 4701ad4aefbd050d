"""How good predicted probabilities are, and how to make them so."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from dmr_pipeline.rollout.engine import Trajectory

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]

_ROLLOUTS = 5
_CLOSE_ENOUGH = 0.01


def platt(margins: Floats, labels: Labels) -> tuple[float, float]:
    """Scale a and offset b of sigmoid(a * margin + b), by maximum likelihood (Platt, 1999).

    As in Platt's paper the targets are (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) instead of 1 and 0, which keeps the scale
    finite where the margin separates the classes.
    """
    positives = int(labels.sum())
    targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))
    design = np.stack([margins, np.ones_like(margins)])

    def loss(parameters: Floats) -> float:
        z = parameters @ design
        return float(np.mean(np.logaddexp(0, z) - targets * z))

    def gradient(parameters: Floats) -> Floats:
        slope: Floats = design @ (expit(parameters @ design) - targets) / len(targets)
        return slope

    def hessian(parameters: Floats) -> Floats:
        p = expit(parameters @ design)
        curvature: Floats = (design * (p * (1 - p))) @ design.T / len(targets)
        return curvature

    a, b = minimize(loss, np.array([1.0, 0.0]), jac=gradient, hess=hessian, method="trust-exact").x
    return float(a), float(b)


def auroc(scores: Floats, labels: Labels) -> float:
    """Chance that a positive scores above a negative, ties counting half."""
    positives = int(labels.sum())
    ranks = rankdata(scores)[labels].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * (len(labels) - positives)))


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
    high_ratio: float
    """Share of all steps."""
    success: float
    """Share of the episodes."""
    steps: int

    @classmethod
    def of(cls, threshold: float, played: Sequence[Trajectory]) -> "OperatingPoint":
        high = [step.high for trajectory in played for step in trajectory.steps]
        success = [trajectory.success for trajectory in played]
        return cls(threshold, sum(high) / len(high), sum(success) / len(success), len(high))


def find_threshold(
    play_at: Callable[[float], OperatingPoint], probabilities: Floats, target: float
) -> tuple[OperatingPoint, list[OperatingPoint]]:
    """The threshold whose closed-loop high-precision ratio is nearest to the target, and all that were tried.

    The ratio in closed loop is not the share of the `probabilities` (open loop) above the threshold, since a router
    changes which states it meets. False position (Illinois) over their quantiles, at most 5 rollouts; the open-loop
    threshold comes first.
    """
    left, right = 0.0, 1.0  # quantiles that everything or nothing is above
    too_high, too_low = 1.0 - target, -target  # what the ratio is off by there
    tried: list[OperatingPoint] = []
    while len(tried) < _ROLLOUTS:
        quantile = left + (right - left) * too_high / (too_high - too_low)
        point = play_at(float(np.quantile(probabilities, quantile)))
        gap = point.high_ratio - target
        same_side = bool(tried) and gap * (tried[-1].high_ratio - target) > 0
        tried.append(point)
        if abs(gap) <= _CLOSE_ENOUGH:
            break
        if gap > 0:
            left, too_high, too_low = quantile, gap, too_low / 2 if same_side else too_low
        else:
            right, too_low, too_high = quantile, gap, too_high / 2 if same_side else too_high
    return min(tried, key=lambda point: abs(point.high_ratio - target)), tried
