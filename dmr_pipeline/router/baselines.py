"""Routing policies that need no training: random mixing, and the disagreement oracle."""

from collections.abc import Sequence

import numpy as np

from dmr_pipeline.agent.rollout import Decision, Peek, Run, seeded_generator


class RandomMixing:
    """Each step at high precision with the same chance, drawn by (seed, task, member)."""

    def __init__(self, high_ratio: float, seed: int) -> None:
        self.high_ratio, self.seed = high_ratio, seed
        self._generators: dict[int, np.random.Generator] = {}

    def begin(self, slot: int, run: Run) -> None:
        self._generators[slot] = seeded_generator("random-mixing", self.seed, run.task.task_id, run.member)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        return [Decision(bool(self._generators[slot].random() < self.high_ratio), self.high_ratio) for slot in slots]

    def acted(self, slot: int, action: list[int]) -> None:
        pass


class Disagreement:
    """Oracle: high precision exactly where the two precisions' greedy actions differ. With exact caches and greedy acting
    it takes the actions of always-high throughout."""

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        return [Decision(low != high, float(low != high)) for low, high in zip(peek(False), peek(True), strict=True)]

    def begin(self, slot: int, run: Run) -> None:
        pass

    def acted(self, slot: int, action: list[int]) -> None:
        pass
