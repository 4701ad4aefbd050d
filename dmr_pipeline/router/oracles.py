"""Oracles that a bar decides for: what could be won if what is only known afterwards were known before, at every budget.

They let all rungs read each transcript and compare what they would do (labels.py), for nothing. `disagreement`: whether the
actions of the cheapest rung and of the dearest differ, by lot where the budget is not enough for all such steps. `divergence`: by
KL(high || low), 1 - exp(-KL), so that the steps that the paper would label first are asked for first. Of a route of more than two
rungs they choose between its ends. Nobody can deploy them. All of it is ours.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from dmr_pipeline.recipe.evaluation import OracleName
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import Decision, DecisionContext
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.rollout.writing import NgramGuesses
from dmr_pipeline.router.labels import Divergence, compare


class Oracle:
    """As `budgets.AtBar` wants it: the dearest rung throughout, and by `Decision.exceedance` where most.

    Args:
        counted: of actions, what is compared, as in `labels.compare`.
        slots: episodes at once.
    """

    def __init__(self, rollouts: Rollouts, name: OracleName, counted: Literal["action", "command"], slots: int) -> None:
        self.route, self.name, self.counted, self._prompter = rollouts.route, name, counted, rollouts.prompter
        self._streams, self._guesses = rollouts.streams(slots), NgramGuesses()
        self._readers = {rung: bytes([reader]) for reader, rung in enumerate(self._streams)}
        self._texts: dict[int, list[int]] = {}
        """The transcript, but for the segment of the present step."""
        self._trails: dict[int, bytearray] = {}
        """Who has read it, but for its last token, which is read with what follows."""

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self._texts[slot], self._trails[slot] = [], bytearray()

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        texts = [self._texts[slot] + segment for slot, segment in zip(slots, segments, strict=True)]
        trails = [self._trails[slot] for slot in slots]
        found = compare(self._streams, slots, texts, self._prompter, self.counted, None, self._guesses, trails)
        levels = [self._level(its.divergences[self.route[-1]]) for its in found]
        return [Decision(self.route[0], (level,) * (len(self.route) - 1)) for level in levels]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        text, trail = self._texts[slot], self._trails[slot]
        text += [*segment, *action]
        trail += self._readers[precision] * (len(text) - 1 - len(trail))

    def _level(self, between: Divergence) -> float:
        if self.name == "disagreement":
            return float(not between.greedy_agree)
        return float(-np.expm1(-between.kl_high_low))
