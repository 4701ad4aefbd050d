"""One KV cache for several rungs: each goes on from the keys and values that whoever read before it has written.

The rungs' weights differ, the layout of their caches does not. What a rung then does depends on who has read which token, a
text's trail: `reader` of a rung's streams for each token.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from transformers import PreTrainedModel

from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.kv_cache.catching_up import common_length
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import Streams, TokenStreams

Sharing = Streams | PackedStreams


class SharedStreams(Mapping[str, TokenStreams]):
    """Rung -> its token streams. All hold the same sequences, in the same memory.

    Args:
        kind: of streams.
        models: rung -> its model, dearest first.
        slots: number of sequences.
        capacity: tokens that one sequence may have.

    Raises:
        UserError: the models compute in different dtypes.
    """

    def __init__(
        self,
        kind: type[Streams] | type[PackedStreams],
        models: Mapping[str, PreTrainedModel],
        slots: int,
        capacity: int,
    ) -> None:
        if len(dtypes := {model.dtype for model in models.values()}) > 1:
            raise UserError(
                f"precisions.cache: shared needs rungs that compute in one dtype, these do in {sorted(map(str, dtypes))}; set"
                " it to separate"
            )
        self._streams: dict[str, Sharing] = {}
        before = None
        for rung, model in models.items():
            # mypy cannot see that both are of one kind.
            before = kind(model, slots, capacity, before)  # type: ignore[arg-type]
            self._streams[rung] = before

    def __getitem__(self, rung: str) -> Sharing:
        return self._streams[rung]

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    def catch_up(
        self, rung: str, slots: Sequence[int], texts: Sequence[Sequence[int]], trails: Sequence[bytes | bytearray]
    ) -> list[list[int]]:
        """As `catching_up.catch_up`, for one rung.

        Args:
            trails: who has read the first tokens of each text. What no slot holds as they have read it, they read here; what
                comes after is the rung's own, and so is a text's last token.
        """
        streams, readers = self[rung], list(self._streams.values())
        known = [list(text[:-1]) for text in texts]
        read_by = [bytes(trail[: len(text)]) for trail, text in zip(trails, known, strict=True)]
        for slot, text, trail in zip(slots, known, read_by, strict=True):
            whole = trail + bytes([streams.reader]) * (len(text) - len(trail))
            streams.truncate(slot, _agreeing(streams, slot, text, whole))
            source, length = _longest(streams, slot, text, whole)
            if source != slot:
                streams.copy(source, slot, length)
        while behind := [i for i, trail in enumerate(read_by) if len(streams.texts[slots[i]]) < len(trail)]:
            behind.sort(key=lambda i: read_by[i][len(streams.texts[slots[i]])])
            for reader, places in groupby(behind, lambda i: read_by[i][len(streams.texts[slots[i]])]):
                together = list(places)
                chunks = [_run(known[i], read_by[i], len(streams.texts[slots[i]])) for i in together]
                readers[reader].extend([slots[i] for i in together], chunks)
        return [list(text[len(streams.texts[slot]) :]) for slot, text in zip(slots, texts, strict=True)]


def _run(text: list[int], trail: bytes, start: int) -> list[int]:
    """From there on, the tokens that the same rung has read."""
    end = next((n for n in range(start, len(trail)) if trail[n] != trail[start]), len(trail))
    return text[start:end]


def _agreeing(streams: Sharing, slot: int, text: list[int], trail: bytes) -> int:
    """How many of a text's first tokens a slot holds as this trail says."""
    return min(common_length(streams.texts[slot], text), common_length(streams.readers[slot], trail))


def _longest(streams: Sharing, slot: int, text: list[int], trail: bytes) -> tuple[int, int]:
    """The slot that holds the longest such beginning of a text, and its tokens."""
    best, length = slot, len(streams.texts[slot])
    for other, held in enumerate(streams.texts):
        if len(held) > length and len(text) > length and held[length] == text[length]:
            agreeing = _agreeing(streams, other, text, trail)
            if agreeing > length:
                best, length = other, agreeing
    return best, length
