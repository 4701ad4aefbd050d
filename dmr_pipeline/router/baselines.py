"""Routing policies that need no training: random mixing, confidence of the draft, and the disagreement oracle."""

from collections.abc import Sequence

import numpy as np

from dmr_pipeline.rollout.engine import Decision, Peek, Run, seeded_generator
from dmr_pipeline.router.search_steps import at_search_bar


class RandomMixing:
    """Each step at high precision with the same chance, drawn by (seed, task, member).

    Args:
        force_search: search steps are at high precision, and are not drawn.
    """

    def __init__(self, high_ratio: float, seed: int, force_search: bool = False) -> None:
        self.high_ratio, self.seed, self.force_search = high_ratio, seed, force_search
        self._generators: dict[int, np.random.Generator] = {}

    def begin(self, slot: int, run: Run) -> None:
        self._generators[slot] = seeded_generator("random-mixing", self.seed, run.task.task_id, run.member)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        forced = at_search_bar(peek) if self.force_search else [False] * len(slots)
        return [
            Decision(True, 1.0, forced=True)
            if by_rule
            else Decision(bool(self._generators[slot].random() < self.high_ratio), self.high_ratio)
            for slot, by_rule in zip(slots, forced, strict=True)
        ]

    def acted(self, slot: int, action: list[int]) -> None:
        pass


class Confidence:
    """Cascade: the low precision drafts every action, and the high one acts instead where the draft's margin is small.

    Unlike a router it decides after the low precision's forward passes, and pays for them at every step.

    Args:
        threshold: high precision acts where 1 - margin is at least this.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def begin(self, slot: int, run: Run) -> None:
        pass

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        decisions = []
        for draft in peek.drafts(False):
            high = 1 - draft.margin >= self.threshold
            decisions.append(Decision(high, 1 - draft.margin, len(draft.action) if high else 0))
        return decisions

    def acted(self, slot: int, action: list[int]) -> None:
        pass


class Disagreement:
    """Oracle: high precision exactly where the two precisions' greedy actions differ. With exact caches and greedy acting
    it takes the actions of always-high throughout."""

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        differ = [low.action != high.action for low, high in zip(peek.drafts(False), peek.drafts(True), strict=True)]
        return [Decision(high, float(high)) for high in differ]

    def begin(self, slot: int, run: Run) -> None:
        pass

    def acted(self, slot: int, action: list[int]) -> None:
        pass
