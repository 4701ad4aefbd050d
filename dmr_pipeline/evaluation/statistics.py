"""Paired tests over games, their correction, and what a number of games can show at all."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom

from dmr_pipeline.precision.hull import Floats

POWER = 0.8


def paired_p_value(first: Floats, second: Floats, first_draws: int, second_draws: int) -> float:
    """Exact two-sided p-value of a permutation test of two policies on the same games; the statistic is the difference of their
    mean success.

    Equal numbers of draws: a sign-flip test. Under the null hypothesis the two policies' results on a game can be swapped, which
    flips the sign of their difference. With one episode a game each, it is the exact McNemar test.

    Unequal ones: a mean of more draws spreads less, so the difference is not symmetric and its sign cannot be flipped. There the
    null hypothesis is that a game's episodes can be swapped one by one: which of them are the first policy's is then a draw
    without replacement, and its wins are hypergeometric, given those of both (the exact conditional test of strata).

    Both distributions of the sum over games are convolutions of whole numbers: no Monte Carlo.

    Args:
        first, second: success per game [games], multiples of 1 / first_draws and 1 / second_draws.
    """
    unit = math.lcm(first_draws, second_draws)
    first_wins, second_wins = (
        np.rint(rates * draws).astype(int) for rates, draws in ((first, first_draws), (second, second_draws))
    )
    differences = np.rint((first - second) * unit).astype(int)
    steps: Iterable[Mapping[int, float]]
    if first_draws == second_draws:
        steps = ({size: 0.5, -size: 0.5} for size in np.abs(differences[differences != 0]).tolist())
    else:
        steps = (_swapped(won, first_draws, second_draws) for won in (first_wins + second_wins).tolist())
    distribution, largest = np.ones(1), 0  # of the sum, index 0 is -largest
    for step in steps:
        reach = max(map(abs, step))
        wider = np.zeros(len(distribution) + 2 * reach)
        for size, share in step.items():
            wider[reach + size : reach + size + len(distribution)] += share * distribution
        distribution, largest = wider, largest + reach
    sums = np.arange(-largest, largest + 1)
    return min(1.0, float(distribution[np.abs(sums) >= abs(differences.sum())].sum()))


def _swapped(won: int, first_draws: int, second_draws: int) -> dict[int, float]:
    """Difference of the mean successes, in units of 1 / lcm of the draws -> its probability, where `won` of a game's episodes
    were won and it is drawn whose they are."""
    unit = math.lcm(first_draws, second_draws)
    wins = range(max(0, won - second_draws), min(first_draws, won) + 1)
    ways = math.comb(first_draws + second_draws, won)
    return {
        unit // first_draws * win - unit // second_draws * (won - win): math.comb(first_draws, win)
        * math.comb(second_draws, won - win)
        / ways
        for win in wins
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for testing all of them (Holm, 1979): each is below a level only where its hypothesis may be rejected while the
    chance of any false rejection stays below that level."""
    order = np.argsort(p_values, kind="stable")
    steps = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values)[order] * steps))
    return [float(value) for value in adjusted]


def smallest_difference(differences: Floats, level: float) -> float | None:
    """The difference in success that as many games as these, on which two policies differ as often or, for larger differences, as
    seldom as can be, show with a chance of 80% in one exact two-sided test (McNemar's); None where there is none, however large.

    The mean squared difference of a game, for single episodes the share of games that end otherwise, is taken from these with
    half a game added to each of the four cells (Agresti & Min, 2005): that none differs is no proof that none would.

    Args:
        differences: of success per game [games]; those of means of several draws count as if they were of single episodes.
        level: of the test, in (0, 1).
    """
    n = len(differences)
    square = (float(np.square(differences).sum()) + 1) / (n + 2)
    differing = np.arange(1, n + 1)
    rejecting = binom.isf(level / 2, differing, 0.5) + 1
    """Games won alone, of each number that differ, from which on the test shows that it is the better one."""

    def lacking(difference: float) -> float:
        """Of the chance that this difference is shown."""
        share = max(square, difference)
        better = (share + difference) / (2 * share)
        shown = binom.sf(rejecting - 1, differing, better) + binom.sf(rejecting - 1, differing, 1 - better)
        return float(binom.pmf(differing, n, share) @ shown) - POWER

    return None if lacking(1.0) < 0 else float(brentq(lacking, 0.0, 1.0, xtol=1e-6))


def games_needed(margin: float, confidence: float) -> int:
    """The least number of games that can show that a policy loses less than `margin` against another: of as many without one loss
    or gain the end of `intervals.paired_interval`, z^2 / (n + z^2), is below the margin.

    Args:
        margin: share of the games; 0 asks for an improvement, which loses no game, so any number can show it.
        confidence: of the two-sided interval.
    """
    if margin <= 0 or margin >= 1:
        return 1
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return math.floor(z * z * (1 - margin) / margin) + 1
