"""What forward passes read: the quantities that cost is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


@dataclass(frozen=True)
class Reading:
    """What forward passes of one model read, one sequence at a time (batch 1)."""

    passes: int = 0
    tokens: int = 0
    """Tokens that they were given."""
    cached: int = 0
    """Tokens whose keys and values they read, the given ones included: summed over the passes, since each reads them again."""

    def __add__(self, other: "Reading") -> "Reading":
        return Reading(self.passes + other.passes, self.tokens + other.tokens, self.cached + other.cached)


NOTHING = Reading()


def one_by_one(held: int, written: int) -> Reading:
    """Of writing an action, without the tokens that the first pass is given: it reads what the transcript has grown by, each
    later one the token that was written last.

    Args:
        held: tokens of the transcript before the action.
        written: tokens of the action, the end included.
    """
    return Reading(written, written - 1, written * held + written * (written - 1) // 2)


def each_in_full(held: int, candidates: list[int]) -> Reading:
    """Of scoring candidates, without the tokens that the first pass is given: it reads what the transcript has grown by, and
    one more pass reads each candidate of more than one token, but for its last.

    Args:
        held: tokens of the transcript.
        candidates: tokens of each, the end included.
    """
    read = [tokens - 1 for tokens in candidates if tokens > 1]
    return Reading(1 + len(read), sum(read), held + sum(held + tokens for tokens in read))


class Round(NamedTuple):
    """A draft of what comes next in an action, and its check."""

    written: int
    """Tokens of the action before it."""
    drafted: int
    """Tokens, at least one."""
    read: int
    """Those of them that who checks has to read: what would complete the action need not be."""
    agreed: int
    """The first ones, which were taken."""
    writing: Reading
    """What writing it read, without the tokens that its first pass is given."""

    @property
    def kept(self) -> int:
        """Tokens of the action that the drafter has read and that are right; its last one it has not read itself."""
        return self.written + min(self.agreed, self.drafted - 1)


def checking(held: int, rounds: Sequence[Round]) -> Reading:
    """Of checking the drafts of an action, a pass each, without the transcript's tokens that the first pass is given: it reads
    the draft, each later one also the token that was put after what had been agreed on.

    Args:
        held: tokens of the transcript.
    """
    passes = (Reading(1, (r.written > 0) + r.read, held + r.written + r.read) for r in rounds)
    return sum(passes, NOTHING)


def drafting(rounds: Sequence[Round], shared: bool = False, ready: bool = False) -> Reading:
    """Of writing these drafts, without the transcript's tokens that the first pass is given: the first pass of each later draft
    reads what it has not read of the action.

    Args:
        shared: it goes on from what who checks has read of the action, all but its last token.
        ready: the first draft was there already.
    """
    written = sum((r.writing for r in rounds[ready:]), NOTHING)
    unread = (1 if shared else later.written - earlier.kept for earlier, later in pairwise(rounds))
    return written + Reading(tokens=sum(unread))
