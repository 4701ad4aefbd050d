"""What single rungs reach without a router: alone, and in mixtures of whole episodes.

Who plays each whole episode in one of two rungs, drawn in advance, reaches every point of the line between them. So the best
success at a mean cost lies on the upper hull of the rungs' points (cost, success), and a router is worth its name above it.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

Floats = NDArray[np.float64]

_NOISE = 1e-9


def best_mixture(costs: Floats, successes: Floats, at: Floats) -> Floats:
    """Success of the best mixture of single rungs whose mean cost is `at` or less, float64 [...].

    Above the best rung's cost it stays level: nobody has to pay more. Below the cheapest rung's cost there is no mixture, and
    the cheapest rung's success is taken, at a higher cost than `at`: a reference that no rung meets there.

    Args:
        costs, successes: [..., rungs], in any order.
        at: costs, [...].
    """
    at = at[..., None]
    cheaper = costs <= at
    alone = np.where(cheaper, successes, -np.inf).max(-1)
    between = cheaper[..., :, None] & ~cheaper[..., None, :]  # [..., rungs, rungs]: one at most, the other above `at`
    span = np.where(between, costs[..., None, :] - costs[..., :, None], 1.0)
    rise = successes[..., None, :] - successes[..., :, None]
    lines = successes[..., :, None] + (at - costs)[..., :, None] / span * rise
    mixed = np.where(between, lines, -np.inf).max((-2, -1))
    cheapest = np.where(costs == costs.min(-1, keepdims=True), successes, -np.inf).max(-1)
    return np.where(cheaper.any(-1), np.maximum(alone, mixed), cheapest)


class Mixture(NamedTuple):
    """Of which single rungs the best mixture at a cost is made."""

    shares: Floats
    """[rungs], of the episodes; they sum to 1, and two are above 0 at most."""
    slope: float
    """Success that one more of cost buys: along the line between the two, 0 where one rung alone is best."""


def mixture_at(costs: Floats, successes: Floats, at: float) -> Mixture:
    """What `best_mixture` is made of, for one cost.

    Args:
        costs, successes: [rungs], in any order.
    """
    alone = np.eye(len(costs))
    cheaper = np.flatnonzero(costs <= at)
    if not cheaper.size:
        cheapest = np.lexsort((-successes, costs))[0]
        return Mixture(alone[cheapest], 0.0)
    best = cheaper[np.lexsort((costs[cheaper], -successes[cheaper]))[0]]
    found = [Mixture(alone[best], 0.0)]
    for one in cheaper:
        for other in np.flatnonzero(costs > at):
            share = (at - costs[one]) / (costs[other] - costs[one])
            slope = (successes[other] - successes[one]) / (costs[other] - costs[one])
            found.append(Mixture((1 - share) * alone[one] + share * alone[other], float(slope)))
    return max(found, key=lambda mixture: float(mixture.shares @ successes))


def rising_hull(costs: Floats, successes: Floats) -> tuple[Floats, Floats]:
    """The non-decreasing upper hull of points [points] as a line to interpolate on, level before and after: costs in rising order
    and the hull there. What `best_mixture` is at each cost, for many points.

    The slopes of the least concave line above a polyline are its own slopes, made monotone (isotonic regression, weighed by
    their lengths).
    """
    order = np.argsort(costs)
    starts = np.flatnonzero(np.diff(costs[order], prepend=-np.inf) > _NOISE)  # of each run of equal costs
    costs, successes = costs[order][starts], np.maximum.reduceat(successes[order], starts)
    if len(costs) == 1:
        return costs, successes
    lengths = np.diff(costs)
    slopes = isotonic_regression(np.diff(successes) / lengths, weights=lengths, increasing=False).x
    return costs, successes[0] + np.append(0.0, np.cumsum(np.maximum(slopes, 0.0) * lengths))


def dominators(points: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    """The rungs that are not on the front -> the rung by which each is dominated: as good or better and not dearer, and not equal
    in both; the best of these, of equals the cheapest.

    Args:
        points: rung -> (cost, success).
    """
    found = {}
    for name, (cost, success) in points.items():
        dominating = [
            (-other_success, other_cost, other)
            for other, (other_cost, other_success) in points.items()
            if (other_cost, other_success) != (cost, success) and other_cost <= cost and other_success >= success
        ]
        if dominating:
            found[name] = min(dominating)[2]
    return found


def below_hull(points: Mapping[str, tuple[float, float]]) -> dict[str, str | Literal["mixture"]]:
    """The rungs that nobody should deploy -> that by which each is dominated; `mixture`: only a mixture of two others beats it at
    its cost. Arguments as of `dominators`."""
    costs, successes = (np.array(values, dtype=np.float64) for values in zip(*points.values(), strict=True))
    beaten = successes + _NOISE < best_mixture(costs, successes, costs)
    mixed = {name: "mixture" for name, is_beaten in zip(points, beaten, strict=True) if is_beaten}
    return {**mixed, **dominators(points)}
