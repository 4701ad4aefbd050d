"""What a precision does at transcripts that it has met before.

Greedy acting is a function of the transcript and, with one cache for all precisions, of who has read which part of it: where
another policy, or another member of a group, gets to the same place, the action can be looked up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dmr_pipeline.rollout.reading import Reading

K = TypeVar("K")
V = TypeVar("V")

_MOST_BYTES = 256_000_000
"""Beyond it nothing more is kept."""
_ENTRY_BYTES = 500
"""About what an action takes, its key included."""

ActionKey = tuple[str, str | None, bytes]
"""Precision, who drafts if any does, and the transcript's digest, with all else that counts (`batch.Batch._place`)."""
StatesKey = tuple[tuple[int, ...], bytes]
"""Layers, and the transcript's digest, as in `ActionKey`."""


@dataclass(frozen=True)
class Drafting:
    """What drafting an action took that another precision checked."""

    drafted: int
    """Tokens."""
    accepted: int
    """Those of them that were taken."""
    reading: Reading
    """What the drafter's forward passes read, but for the tokens that the transcript has grown by."""
    kept: int
    """Tokens after the transcript that the drafter's stream then holds, and that are right."""


@dataclass(frozen=True)
class KnownAction:
    tokens: list[int]
    margin: float
    """As `policy.Draft.margin`."""
    mean_margin: float
    """As `policy.Draft.mean_margin`."""
    reading: Reading
    """What its forward passes read, but for the tokens that the transcript has grown by."""
    kept: int
    """Tokens after the transcript that the stream then holds."""
    drafting: Drafting | None = None
    """Where it was drafted by another precision."""
    entropy: float = 0.0
    """As `policy.Draft.entropy`."""


class Transcript:
    """Token ids, and a digest of them that costs as much as what is appended."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._hash = blake2b(digest_size=16)

    def append(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self._hash.update(np.asarray(tokens, np.int64).tobytes())

    def digest(self) -> bytes:
        return self._hash.digest()


@dataclass
class Known:
    """Greedy actions of the rungs that act together, and the cheapest's hidden states, by transcript.

    They equal what would be computed anew up to rounding, as everything does that is computed in another batch. Whoever needs
    the same bytes from the same inputs starts from an empty one.
    """

    actions: dict[ActionKey, KnownAction] = field(default_factory=dict)
    states: dict[StatesKey, NDArray[np.float32]] = field(default_factory=dict)
    asked: int = 0
    """Actions that were wanted."""
    looked_up: int = 0
    """Those among them that were known."""

    @property
    def share(self) -> float:
        """Of the actions that were wanted, those that were looked up."""
        return self.looked_up / max(self.asked, 1)

    def fill(self, table: dict[K, V], keys: dict[int, K], compute: Callable[[list[int]], Sequence[V]]) -> list[V]:
        """The values of these slots' keys; what is not in the table is computed, once for each key, and added.

        Args:
            table: one of the two here.
            compute: slots in their order -> a value each.
        """
        new = sorted({key: slot for slot, key in reversed(keys.items()) if key not in table}.values())
        computed = compute(new) if new else []
        found = {keys[slot]: value for slot, value in zip(new, computed, strict=True)}
        if self._has_room():
            table |= found
        return [found[key] if key in found else table[key] for key in keys.values()]

    def _has_room(self) -> bool:
        row = next(iter(self.states.values()), None)  # all are of one size
        held = 0 if row is None else row.nbytes * len(self.states)
        return held + _ENTRY_BYTES * len(self.actions) < _MOST_BYTES

    def since(self, earlier: "Known") -> "Known":
        """What was found since a copy was made of it."""
        return Known(
            {key: value for key, value in self.actions.items() if key not in earlier.actions},
            {key: value for key, value in self.states.items() if key not in earlier.states},
            self.asked - earlier.asked,
            self.looked_up - earlier.looked_up,
        )

    def copied(self) -> "Known":
        return Known(dict(self.actions), dict(self.states), self.asked, self.looked_up)

    def add(self, found: "Known") -> None:
        """What another process has found."""
        self.actions |= found.actions
        self.states |= found.states
        self.asked += found.asked
        self.looked_up += found.looked_up
