"""Paired tests, against enumeration, SciPy and simulated null hypotheses; Holm; what a number of games can show."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from dmr_pipeline.evaluation.statistics import games_needed, holm, paired_p_value, smallest_difference

# The paired test


@given(arrays(np.bool_, (2, 60)))
def test_one_draw_each_is_mcnemars(outcomes: np.ndarray) -> None:
    first, second = outcomes.astype(float)
    better, worse = int((first > second).sum()), int((first < second).sum())
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert paired_p_value(first, second, 1, 1) == pytest.approx(expected, rel=1e-9)


@given(arrays(np.int64, (2, 7), elements=st.integers(0, 3)))
def test_equal_draws_are_the_enumeration_of_signs(outcomes: np.ndarray) -> None:
    difference = outcomes[0] - outcomes[1]
    sums = [abs(int(np.dot(signs, difference))) for signs in product((-1, 1), repeat=7)]
    expected = np.mean([total >= abs(int(difference.sum())) for total in sums])
    assert paired_p_value(outcomes[0] / 3, outcomes[1] / 3, 3, 3) == pytest.approx(expected)


def swaps(won: int, first_draws: int, second_draws: int) -> list[float]:
    """Difference of the means, for each way to say which of a game's episodes are the first policy's."""
    episodes = np.arange(first_draws + second_draws) < won
    chosen = [list(which) for which in combinations(range(len(episodes)), first_draws)]
    return [episodes[which].mean() - np.delete(episodes, which).mean() for which in chosen]


@pytest.mark.parametrize("draws", [(1, 3), (3, 1), (2, 3), (1, 2)])
@given(seed=st.integers(0, 1000))
def test_unequal_draws_are_the_enumeration_of_swapped_episodes(draws: tuple[int, int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    wins = [generator.integers(0, n + 1, 4) for n in draws]
    sums = [sum(parts) for parts in product(*(swaps(won, *draws) for won in wins[0] + wins[1]))]
    first, second = (won / n for won, n in zip(wins, draws, strict=True))
    expected = np.mean(np.abs(sums) >= abs((first - second).sum()) - 1e-9)
    assert paired_p_value(first, second, *draws) == pytest.approx(expected)


def rejected(chance: np.ndarray, draws: tuple[int, int], studies: int, seed: int) -> tuple[float, float]:
    """Share of studies without a difference that are significant at 5%: by the test, and by flipping signs."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(studies):
        first, second = (generator.binomial(n, chance) / n for n in draws)
        unit = math.lcm(*draws)  # sign flips see only the differences, as if each mean came from `unit` draws
        flipped = paired_p_value(np.maximum(first - second, 0), np.maximum(second - first, 0), unit, unit)
        found.append((paired_p_value(first, second, *draws) <= 0.05, flipped <= 0.05))
    exact, flips = np.mean(found, axis=0)
    return float(exact), float(flips)


def test_its_size_is_at_most_what_it_says_where_draws_differ() -> None:
    """1 draw against 3, on few hard games, where a mean of three spreads less than one episode."""
    exact, _ = rejected(np.full(12, 0.3), (1, 3), 1500, seed=0)
    assert exact <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1500)
    assert exact >= 0.02  # and it does reject


def test_no_level_is_exceeded_under_the_null_hypothesis() -> None:
    """All outcomes of three games with 1 and 2 draws, each with its chance: P(p <= level) is at most every level."""
    levels: dict[float, float] = {}
    chance = np.array([0.2, 0.5, 0.9])
    for wins in product(*[range(2), range(3)] * 3):
        first, second = np.array(wins[::2]), np.array(wins[1::2])
        weight = float(np.prod(stats.binom.pmf(first, 1, chance) * stats.binom.pmf(second, 2, chance)))
        p = round(paired_p_value(first / 1, second / 2, 1, 2), 9)
        levels[p] = levels.get(p, 0.0) + weight
    so_far = 0.0
    for p, weight in sorted(levels.items()):
        so_far += weight
        assert so_far <= p + 1e-8


# Holm


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.5))
def test_holm_steps_down(p_values: list[float], level: float) -> None:
    """As the procedure is written: the smallest against level / m, the next against level / (m - 1), until one fails."""
    rejected_ones = set()
    for step, k in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[k] * (len(p_values) - step) > level:
            break
        rejected_ones.add(k)
    assert {k for k, p in enumerate(holm(p_values)) if p <= level} == rejected_ones


# What a number of games can show


def exact_power(games: int, differing: float, difference: float) -> float:
    """Of McNemar's test at 5%, over all numbers of games won alone."""
    better, power = (differing + difference) / 2 / differing, 0.0
    for discordant in range(games + 1):
        wins = np.arange(discordant + 1)
        p = np.minimum(1, 2 * stats.binom.cdf(np.minimum(wins, discordant - wins), discordant, 0.5))
        shown = float(stats.binom.pmf(wins, discordant, better)[p <= 0.05].sum())
        power += float(stats.binom.pmf(discordant, games, differing)) * shown
    return power


@pytest.mark.parametrize(
    ("games", "ones"), [(200, 20), (200, 60), (800, 80), (40, 0), (100, 4), (140, 2), (200, 4), (200, 6), (12, 12)]
)
def test_the_smallest_difference_is_shown_with_a_chance_of_80_percent(games: int, ones: int) -> None:
    """Also where hardly a game differs: a larger difference takes as many games that do, at least."""
    differences = np.repeat([1.0, -1.0, 0.0], [ones // 2, ones - ones // 2, games - ones])
    difference = smallest_difference(differences, 0.05)
    assert difference is not None
    assert exact_power(games, max((ones + 1) / (games + 2), difference), difference) == pytest.approx(0.8, abs=1e-3)


def test_games_that_never_differ_still_could_not_show_everything() -> None:
    """Six games that one policy wins alone are the least that a test at 5% tells."""
    for games in (30, 3000):
        assert 1 - stats.binom.cdf(5, games, smallest_difference(np.zeros(games), 0.05)) == pytest.approx(0.8, abs=1e-3)
    assert [smallest_difference(np.zeros(games), 0.05) for games in (1, 5)] == [None, None]
    assert smallest_difference(np.zeros(6), 0.05) == pytest.approx(0.8 ** (1 / 6), abs=1e-4)


@pytest.mark.parametrize(
    ("margin", "confidence"), [(0.05, 0.95), (0.17, 0.95), (0.168, 0.95), (0.01, 0.9), (0.5, 0.99)]
)
def test_games_needed_are_those_whose_bound_is_below_the_margin(margin: float, confidence: float) -> None:
    def bound(games: int) -> float:
        return stats.binomtest(0, games).proportion_ci(confidence, "wilson").high

    needed = games_needed(margin, confidence)
    assert bound(needed) < margin <= bound(needed - 1)
    assert games_needed(0.05, 0.95) == 73
    assert (games_needed(0.0, 0.95), games_needed(1.0, 0.95)) == (1, 1)
