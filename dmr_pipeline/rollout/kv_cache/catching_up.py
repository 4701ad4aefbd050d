"""What a stream has missed of its text: copied where another stream holds it, and read only where none does.

A precision reads a transcript where it is asked what it would do, so it may lag far behind. Other members of a group, other
draws of a game, and the episodes that a slot had before often began with the same tokens, and their keys and values are the
same.
"""

from collections.abc import Sequence

from dmr_pipeline.rollout.kv_cache.padded import TokenStreams


def catch_up(streams: TokenStreams, slots: Sequence[int], texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Let each of these slots hold the longest beginning of its text that any slot holds, but for the text's last token.

    Args:
        texts: token ids, at least one each. What a slot holds beyond its text's beginning is dropped.

    Returns:
        What is left of each text.
    """
    left = []
    for slot, text in zip(slots, texts, strict=True):
        known = text[:-1]
        streams.truncate(slot, common_length(streams.texts[slot], known))
        if streams.cuts:
            source, length = _longest(streams, slot, known)
            if source != slot:
                streams.copy(source, slot, length)
        left.append(list(text[len(streams.texts[slot]) :]))
    return left


def _longest(streams: TokenStreams, slot: int, text: Sequence[int]) -> tuple[int, int]:
    """The slot that holds the longest beginning of this text, and its tokens."""
    best, length = slot, len(streams.texts[slot])
    for other, held in enumerate(streams.texts):
        if len(held) > length and len(text) > length and held[length] == text[length]:
            common = common_length(held, text)
            if common > length:
                best, length = other, common
    return best, length


def common_length(held: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens both begin with."""
    most = min(len(held), len(text))
    if held[:most] == text[:most]:
        return most
    return next(n for n in range(most) if held[n] != text[n])
