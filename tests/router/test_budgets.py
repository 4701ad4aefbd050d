"""Bars: lots at ties, samples, strict budgets, and the search for them in closed loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.rollout.policy import Decision
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.budgets import NOBODY, AtBar, Bar, Lot, Tried, bar_at, find_bars
from tests.helpers.rollouts import ROUTE, THREE

GAMES = [generate_game(seed)[0] for seed in range(4)]


@dataclass
class Told:
    """A policy with these levels, step by step; it is told who acted."""

    levels: Sequence[tuple[float, ...]]
    route: Sequence[str] = ROUTE
    forced: Sequence[int] = ()
    """Turns."""
    drafter: str | None = None
    turn: int = 0
    acting: tuple[str, ...] = ()

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self.turn, self.acting = 0, ()

    def decide(self, slots, segments, peek) -> list[Decision]:
        level = self.levels[self.turn % len(self.levels)]
        return [Decision(self.route[0], level, forced=self.turn in self.forced, drafter=self.drafter)] * len(slots)

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self.turn += 1
        self.acting += (precision,)


def decided(policy: Told, bar: Bar, steps: int, seed: int = 0, game: int = 0) -> list[Decision]:
    at_bar, found = AtBar(policy, policy.route, bar, seed), []
    at_bar.begin(0, RolloutRequest(GAMES[game]))
    for _ in range(steps):
        found += at_bar.decide([0], [[1]], None)
        at_bar.acted(0, [1], found[-1].precision, [2])
    assert policy.acting == tuple(decision.precision for decision in found)
    return found


def share(decisions: Sequence[Decision]) -> float:
    return sum(decision.precision == "float" for decision in decisions) / len(decisions)


def test_the_dearest_rung_that_reaches_the_bar_acts_and_only_it_is_drafted_for() -> None:
    policy = Told([(0.2, 0.9), (0.6, 0.9), (0.1, 0.2)], THREE, drafter="int2")
    found = decided(policy, Bar(0.5), 3)
    assert [(d.precision, d.drafter) for d in found] == [("int4", "int2"), ("float", "int2"), ("int2", None)]
    assert [d.exceedance for d in found] == [*policy.levels]


def test_ties_are_drawn_by_task_and_turn() -> None:
    policy = Told([(0.5,)])
    some = decided(policy, Bar(0.5, ties=0.3), 2000)
    assert share(some) == pytest.approx(0.3, abs=0.04)
    assert decided(policy, Bar(0.5, ties=0.3), 2000) == some
    assert decided(policy, Bar(0.5, ties=0.3), 2000, seed=1) != some
    assert decided(policy, Bar(0.5, ties=0.3), 2000, game=1) != some
    assert share(decided(policy, Bar(0.5), 20)) == 1
    assert share(decided(policy, Bar(0.5, ties=0.0), 20)) == share(decided(policy, Bar(0.51), 20)) == 0


def test_a_lot_is_the_same_whatever_the_levels() -> None:
    high, low = (decided(Told([(level,)]), Lot(0.0, ties=0.3), 1000) for level in (0.9, 0.1))
    assert [d.precision for d in high] == [d.precision for d in low]
    assert share(high) == pytest.approx(0.3, abs=0.05)
    assert {d.exceedance for d in low} == {(0.1,)}


def test_a_sample_is_drawn_with_the_level_s_odds_over_the_threshold_s() -> None:
    assert Bar(0.5, sample=True).chance(0.3) == pytest.approx(0.3)
    odds = (0.3 / 0.7) / (0.8 / 0.2)
    assert Bar(0.8, sample=True).chance(0.3) == pytest.approx(odds / (1 + odds))
    assert [Bar(t, sample=True).chance(0.4) for t in (0.0, 1.0)] == [1, 0]
    assert [NOBODY.chance(level) for level in (0.0, 0.5, 1.0)] == [0, 0, 0]
    assert share(decided(Told([(0.3,)]), Bar(0.8, sample=True), 3000)) == pytest.approx(odds / (1 + odds), abs=0.03)
    # One draw a step: who asks for the dearest asks for all that are dearer than the cheapest.
    found = decided(Told([(0.2, 0.6)], THREE), Bar(0.5, sample=True), 3000)
    shares = [sum(d.precision == rung for d in found) / 3000 for rung in THREE]
    assert shares == pytest.approx([0.2, 0.4, 0.4], abs=0.04)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 0.99), st.floats(0, 1))
def test_a_strict_budget_holds_at_every_step(values: list[float], ratio: float, threshold: float) -> None:
    found = decided(Told([(value,) for value in values]), Bar(threshold, strict=ratio), len(values))
    for n in range(1, len(values) + 1):
        assert sum(d.precision == "float" for d in found[:n]) <= ceil(round(ratio * n, 9))
    if threshold == 0:  # everything is asked for, so nothing of the budget is left
        assert sum(d.precision == "float" for d in found) == ceil(round(ratio * len(values), 9))


def test_what_was_not_used_is_there_later_and_forced_steps_count() -> None:
    quiet_first = Told([(0.0,)] * 8 + [(1.0,)] * 8)
    assert [d.precision for d in decided(quiet_first, Bar(0.5, strict=0.25), 16)].index("float") == 8
    assert [d.precision == "float" for d in decided(quiet_first, Bar(0.5, strict=0.25), 12)[8:]] == [True] * 3 + [False]
    forced = Told([(1.0,)], forced=(0, 1, 2))
    assert [d.precision == "float" for d in decided(forced, Bar(0.5, strict=0.5), 8)] == [
        *(True, True, True, False, False, False, True, False)
    ]


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1), min_size=1, max_size=60),
    st.floats(0, 1),
)
def test_a_bar_is_above_as_many_levels_as_it_is_asked_for(values: list[float], quantile: float) -> None:
    """Lots at ties included; where a level is one step's alone, up to that step."""
    bar = bar_at(np.array(values), quantile)
    expected = sum(bar.chance(value) for value in values)
    wanted = (1 - quantile) * len(values)
    assert wanted - 1e-6 <= expected < wanted + 1
    run = values.count(bar.threshold)
    if run > 1:
        assert expected == pytest.approx(wanted, abs=1e-6)
    drawn = bar_at(np.array(values), quantile, sample=True)
    assert drawn.sample
    assert sum(drawn.chance(value) for value in values) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("few", [False, True])
def test_bars_meet_all_budgets_in_closed_loop_with_fewer_rollouts_each(power: float, few: bool) -> None:
    """A world in which the policy, acting, meets other states; with continuous levels, or with three levels alone."""
    generator = np.random.default_rng(1)
    levels = generator.choice([0.0, 0.5, 1.0], 5000) if few else generator.beta(1, 4, 5000)
    rollouts: list[Bar] = []

    def play_at(bar: Bar) -> float:
        rollouts.append(bar)
        return float(np.mean([bar.chance(level) for level in levels])) ** power

    targets = (0.1, 0.2, 0.3, 0.4, 0.6)
    found = list(find_bars(play_at, levels, targets))
    for target, point in zip(targets, found, strict=True):
        assert target - 0.03 <= point.spend <= target
        assert play_at(point.bar) == point.spend
    assert len(rollouts) - len(targets) <= (5 if power == 1 else 15)
    (near,) = find_bars(play_at, levels, [0.3], close_enough=0.002)
    assert 0.296 <= near.spend <= 0.3


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=30), st.floats(0.001, 0.999), st.floats(0, 0.4))
def test_a_budget_means_at_most(values: list[float], target: float, forced: float) -> None:
    levels = np.array(values)

    def play_at(bar: Bar) -> float:
        return forced + (1 - forced) * float(np.mean([bar.chance(level) for level in levels]))

    (point,) = find_bars(play_at, levels, [target])
    assert isinstance(point, Tried)
    assert point.spend <= target or point.spend == forced
