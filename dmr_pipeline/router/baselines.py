"""Routing policies that need no training: random mixing, confidence of the draft, and the disagreement oracle."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from dmr_pipeline.rollout.choosing import seeded_generator
from dmr_pipeline.rollout.policy import Decision, DecisionContext, certain
from dmr_pipeline.rollout.trajectory import RolloutRequest


def two_way_shares(route: Sequence[str], dearest: float) -> dict[str, float]:
    """So large a share for the dearest rung, the rest for the cheapest."""
    return {rung: dearest if rung == route[0] else 1 - dearest if rung == route[-1] else 0.0 for rung in route}


class RandomMixing:
    """Each step at a precision drawn with these chances, by (seed, task, member).

    Args:
        shares: routed rung -> its chance, dearest first; they sum to 1.
    """

    def __init__(self, shares: Mapping[str, float], seed: int) -> None:
        self.route, self.seed = tuple(shares), seed
        self.exceedance = tuple(accumulate(shares.values()))[:-1]
        self._generators: dict[int, np.random.Generator] = {}

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self._generators[slot] = seeded_generator("random-mixing", self.seed, run.task.task_id, run.member)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        return [Decision(self._drawn(slot), self.exceedance) for slot in slots]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        pass

    def _drawn(self, slot: int) -> str:
        draw = self._generators[slot].random()
        reached = (rung for rung, share in zip(self.route, self.exceedance, strict=False) if draw < share)
        return next(reached, self.route[-1])


class Confidence:
    """Cascade: the cheapest precision drafts every action, and the next dearer one does where its margin is small, and so on.

    Unlike a router it decides after the forward passes of the drafts, and pays for those that are thrown away.

    Args:
        route: the rungs, dearest first.
        threshold: a draft is taken where 1 - margin is below this.
    """

    def __init__(self, route: Sequence[str], threshold: float) -> None:
        self.route, self.threshold = tuple(route), threshold

    def begin(self, slot: int, run: RolloutRequest) -> None:
        pass

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        doubts: dict[int, list[float]] = {slot: [] for slot in slots}
        """1 - margin of each draft, the cheapest precision's first."""
        taken: dict[int, str] = {}
        for rung in self.route[:0:-1]:
            unsure = [slot for slot in slots if slot not in taken]
            for slot, draft in zip(unsure, peek.drafts(rung, unsure), strict=True):
                doubts[slot].append(1 - draft.margin)
                if doubts[slot][-1] < self.threshold:
                    taken[slot] = rung
        return [Decision(taken.get(slot, self.route[0]), self._exceedance(doubts[slot])) for slot in slots]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        pass

    def _exceedance(self, doubts: Sequence[float]) -> tuple[float, ...]:
        """A dearer precision acts where all cheaper ones are in doubt."""
        in_doubt = [*accumulate(doubts, min), *[0.0] * (len(self.route) - 1 - len(doubts))]
        return tuple(reversed(in_doubt))


class Disagreement:
    """Oracle: the cheapest precision whose greedy action is the dearest's. With a cache for each and greedy acting it takes
    the actions of the dearest precision throughout; with one cache the actions differ by what the cheaper ones have read."""

    def __init__(self, route: Sequence[str]) -> None:
        self.route = tuple(route)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        left, chosen = list(slots), dict[int, str]()
        for rung in self.route[:0:-1]:
            drafts = peek.drafts(rung, left)
            dearest = peek.drafts(self.route[0], left)
            agreed = [
                slot for slot, one, other in zip(left, drafts, dearest, strict=True) if one.action == other.action
            ]
            chosen |= dict.fromkeys(agreed, rung)
            left = [slot for slot in left if slot not in chosen]
        decided = [chosen.get(slot, self.route[0]) for slot in slots]
        return [Decision(rung, certain(rung, self.route), charged=False) for rung in decided]

    def begin(self, slot: int, run: RolloutRequest) -> None:
        pass

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        pass
