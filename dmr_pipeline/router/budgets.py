"""A budget turns the levels that a policy gives its steps into decisions: one bar for all of them, found in closed loop.

The level of a step is `Decision.exceedance`: how much a dearer rung is asked for. A dearer rung acts where the level is above the
bar. Where many steps share a level (a rule that counts, a repeated state) a bar alone jumps from one ratio to another; there it
is drawn by lot, by (seed, task, member, turn), so that every ratio can be reached and the same episodes come out again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit

from dmr_pipeline.rollout.choosing import seeded_generator
from dmr_pipeline.rollout.policy import Decision, DecisionContext, RoutingPolicy
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.calibration import ROLLOUTS, FalsePosition

Floats = NDArray[np.float64]

_LEAST_LEVEL, _FAR = 1e-6, 100.0
"""Of samples: levels closer to 0 or 1 are taken as this far from it, so that there are odds; and log-odds that none has."""
_DIGITS = 9
"""Of products that are rounded up."""


@dataclass(frozen=True)
class Bar:
    """What levels are compared with."""

    threshold: float
    """A dearer rung acts where its level is above this."""
    ties: float = 1.0
    """Chance that it acts where its level is just this."""
    sample: bool = False
    """The rung is drawn instead: the odds of each level, level / (1 - level), are divided by the threshold's. At 0.5 a level is
    the chance itself."""
    strict: float | None = None
    """No episode is over this budget at any step: of its first n steps at most ceil(strict * n) are not the cheapest rung's. What
    was not used is there later; forced steps count, but are not refused."""

    def is_used_up(self, steps: int, dearer: int) -> bool:
        """Whether a strict budget leaves nothing for the next step.

        Args:
            steps: of the episode so far.
            dearer: those of them that were not the cheapest rung's.
        """
        return self.strict is not None and dearer + 1 > ceil(round(self.strict * (steps + 1), _DIGITS))

    def chance(self, level: float) -> float:
        """That a dearer rung acts."""
        if not self.sample:
            return self.ties if level == self.threshold else float(level > self.threshold)
        if not 0 < self.threshold < 1:
            return float(self.threshold <= 0)
        level = min(max(level, _LEAST_LEVEL), 1 - _LEAST_LEVEL)
        asked = level * (1 - self.threshold)
        return asked / (asked + (1 - level) * self.threshold)


NOBODY = Bar(1.0, ties=0.0)
"""Above all levels."""


@dataclass(frozen=True)
class Lot(Bar):
    """Levels count for nothing: a dearer rung acts with the chance `ties`."""

    def chance(self, level: float) -> float:
        return self.ties


class AtBar:
    """A policy's levels, decided by a bar.

    Args:
        policy: fills in `Decision.exceedance`, and names the dearest rung throughout, as one whose own threshold is 0: so its
            decision says who drafts for it, if anybody. What it forces stays as it is.
        route: the rungs, dearest first.
        seed: of lots.
    """

    def __init__(self, policy: RoutingPolicy, route: Sequence[str], bar: Bar, seed: int = 0) -> None:
        self.policy, self.route, self.bar, self.seed = policy, tuple(route), bar, seed
        self._runs: dict[int, RolloutRequest] = {}
        self._steps: dict[int, tuple[int, int]] = {}
        """Of each slot's episode: steps so far, and those of them that were not the cheapest rung's."""

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self.policy.begin(slot, run)
        self._runs[slot], self._steps[slot] = run, (0, 0)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        asked = self.policy.decide(slots, segments, peek)
        return [self._decided(slot, decision) for slot, decision in zip(slots, asked, strict=True)]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        steps, dearer = self._steps[slot]
        self._steps[slot] = steps + 1, dearer + (precision != self.route[-1])
        self.policy.acted(slot, segment, precision, action)

    def _decided(self, slot: int, decision: Decision) -> Decision:
        if decision.forced:
            return decision
        steps, dearer = self._steps[slot]
        if self.bar.is_used_up(steps, dearer):
            chosen = self.route[-1]
        else:
            chances = [self.bar.chance(level) for level in decision.exceedance]
            undecided = any(0 < chance < 1 for chance in chances)
            lot = self._lot(slot, steps) if undecided else 0.5
            chosen = next(
                (rung for rung, chance in zip(self.route, chances, strict=False) if lot < chance), self.route[-1]
            )
        drafter = decision.drafter if chosen != self.route[-1] else None
        return replace(decision, precision=chosen, drafter=drafter)

    def _lot(self, slot: int, turn: int) -> float:
        run = self._runs[slot]
        return seeded_generator("lot", self.seed, run.task.task_id, run.member, turn).random()


def bar_at(levels: Floats, quantile: float, sample: bool = False) -> Bar:
    """The bar that so large a share of the levels is below, lots included: from 0, all above, to 1, none. Of a sample, the one at
    which that share of the steps would be the cheapest rung's.

    Where the level at that place is one step's alone, the bar lies half way to the next one below: levels of another batch may
    differ in their last bits.
    """
    ordered = np.sort(levels)[::-1]
    above = round((1 - quantile) * len(ordered), _DIGITS)
    if above <= 0:
        return replace(NOBODY, sample=sample)
    if sample:
        odds = logit(np.clip(levels, _LEAST_LEVEL, 1 - _LEAST_LEVEL))
        if quantile <= 0:
            return Bar(0.0, sample=True)
        shift = brentq(lambda x: float(expit(odds - x).mean()) - (1 - quantile), -_FAR, _FAR)
        return Bar(float(expit(shift)), sample=True)
    place = min(ceil(above), len(ordered)) - 1
    threshold = ordered[place]
    higher, run = int((ordered > threshold).sum()), int((ordered == threshold).sum())
    if run == 1:
        below = ordered[place + 1] if place + 1 < len(ordered) else 0.0
        return Bar(float((threshold + below) / 2))
    return Bar(float(threshold), float((above - higher) / run))


@dataclass(frozen=True)
class Tried:
    """A bar, and what was spent at it in closed loop."""

    quantile: float
    """As in `bar_at`."""
    bar: Bar
    spend: float
    """Mean over all steps, see `ActingModels.spend`."""


def find_bars(
    play_at: Callable[[Bar], float],
    levels: Floats,
    targets: Sequence[float],
    sample: bool = False,
    close_enough: float = 0.01,
) -> Iterator[Tried]:
    """For each target, in their order, the bar whose closed-loop spend is the largest that is at most the target.

    As `calibration.find_threshold`, for several budgets: what was played for one narrows the search for the next. False position
    (Illinois) over the quantiles of the levels, at most 5 rollouts a target. If all that was played spends more than the target,
    a bar above all levels is tried, where only what is forced is spent; what spends least is then taken.

    Args:
        play_at: plays, and gives the spend.
        levels: exceedances met in some rollout, in any order.
        sample: bars that sample.
        close_enough: spend, on both sides of what is aimed at, which is as much below the target.
    """
    tried: list[Tried] = []

    def play(quantile: float) -> Tried:
        bar = bar_at(levels, quantile, sample)
        known = next((point for point in tried if point.bar == bar), None)
        point = Tried(quantile, bar, play_at(bar) if known is None else known.spend)
        tried.append(point)
        return point

    for target in targets:
        _search(play, tried, target, close_enough)
        if all(point.spend > target for point in tried):
            play(1.0)
        within = [point for point in tried if point.spend <= target]
        yield max(within, key=lambda point: point.spend) if within else min(tried, key=lambda point: point.spend)


def _search(play: Callable[[float], Tried], tried: Sequence[Tried], target: float, close_enough: float) -> None:
    tolerance = min(close_enough, target / 2)
    aim = target - tolerance
    over = [point for point in tried if point.spend > aim]
    under = [point for point in tried if point.spend <= aim]
    left, too_high = max(((point.quantile, point.spend - aim) for point in over), default=(0.0, 1 - aim))
    right, too_low = min(((point.quantile, point.spend - aim) for point in under), default=(1.0, -aim))
    search = FalsePosition(left, too_high, right, too_low)
    if left >= right:  # the spend does not fall throughout
        search = FalsePosition.over_all(aim)
    for _ in range(ROLLOUTS):
        if any(target - 2 * tolerance <= point.spend <= target for point in tried):
            return
        point = play(search.quantile)
        search.narrow(point.quantile, point.spend - aim)
