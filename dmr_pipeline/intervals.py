"""Intervals of success rates."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


def wilson(rate: float, n: int, confidence: float) -> list[float]:
    """Score interval of a proportion (Wilson, 1927); `rate * n` need not be whole."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # Rounding must not push an end past the estimate, at 0 and 1.
    return [max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))]


def paired_interval(first: NDArray[np.bool_], second: NDArray[np.bool_], confidence: float) -> tuple[float, float]:
    """Of the difference of two success rates on the same games, first minus second: Wald's with half a game added to each of the
    four cells (Agresti & Min, 2005). It has a width also where the two never differ.

    Args:
        first, second: whether each game was won [games].
    """
    n = len(first) + 2
    gains, losses = int((first & ~second).sum()) + 0.5, int((second & ~first).sum()) + 0.5
    difference = (gains - losses) / n
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt((gains + losses) / n - difference**2) / math.sqrt(n)
    return max(-1.0, difference - half), min(1.0, difference + half)
