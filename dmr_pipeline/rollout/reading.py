"""What forward passes read: the quantities that cost is made of."""

from dataclasses import dataclass


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
