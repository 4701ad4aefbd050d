"""Intervals of success rates."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Successes = NDArray[np.bool_] | NDArray[np.float64]

_NEXT = 1e-9
"""Beside the estimate, where no difference is rejected."""


def wilson(rate: float, n: int, confidence: float) -> list[float]:
    """Score interval of a proportion (Wilson, 1927); `rate * n` need not be whole."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # Rounding must not push an end past the estimate, at 0 and 1.
    return [max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))]


def paired_interval(first: Successes, second: Successes, confidence: float) -> tuple[float, float]:
    """Score interval of the difference of two success rates on the same games, first minus second (Tango, 1998): the differences
    that the score test with the restricted maximum-likelihood estimate does not reject. It has a width also where the two never
    differ, and keeps its level where few games differ, where a bootstrap does not.

    Args:
        first, second: success of each game [games]; of several draws their mean, which makes the interval wider than it need be.
    """
    apart = first.astype(np.float64) - second.astype(np.float64)
    n, gains, losses = apart.size, float(apart.clip(min=0).sum()), float((-apart).clip(min=0).sum())
    z, found = NormalDist().inv_cdf(0.5 + confidence / 2), (gains - losses) / n

    def rejected_by(difference: float) -> float:
        """Above 0 where this difference is."""
        b = -(gains + losses) + (2 * n - gains + losses) * difference
        c = -losses * difference * (1 - difference)
        lost = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        return n * (found - difference) ** 2 - z * z * (2 * lost + difference * (1 - difference))

    low = brentq(rejected_by, -1.0, found - _NEXT) if found - _NEXT > -1 else -1.0
    high = brentq(rejected_by, found + _NEXT, 1.0) if found + _NEXT < 1 else 1.0
    return float(low), float(high)
