"""A policy that asks before it decides, and streams that count what is then read."""

from collections import Counter

from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.policy import Decision
from dmr_pipeline.rollout.reading import NOTHING, Reading


class Counted(Streams):
    """Counts what its forward passes read, of all slots."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.reading = NOTHING

    def _hidden(self, slots, chunks, layers=()):
        for slot, chunk in zip(slots, chunks, strict=True):
            self.reading += Reading(1, len(chunk), len(self.texts[slot]) + len(chunk))
        return super()._hidden(slots, chunks, layers)


class Asking:
    """Every other step is checked, after the cheapest precision was asked for states or a draft, the dearest for a draft, or
    nobody for anything."""

    def __init__(self, *asked: str) -> None:
        self.asked, self.turns = asked, Counter[int]()

    def begin(self, slot, run) -> None:
        self.turns[slot] = 0

    def decide(self, slots, segments, peek) -> list[Decision]:
        if "states" in self.asked:
            peek.states(slots, [1])
        if "draft" in self.asked:
            peek.drafts("int2", slots)
        if "dear" in self.asked:
            peek.drafts("float", slots)
        return [self.decided(slot) for slot in slots]

    def decided(self, slot: int) -> Decision:
        return Decision("float", (), drafter="int2") if self.turns[slot] % 2 else Decision("int2", ())

    def acted(self, slot, segment, precision, action) -> None:
        self.turns[slot] += 1
