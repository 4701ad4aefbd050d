"""Many growing token sequences over one causal LM, with exact KV caching.

An agent's transcript only ever grows, so everything computed for its prefix can be kept. `Streams` holds a batch of
such sequences, each of its own length. A call feeds a chunk of tokens to some of them; the logits equal, up to float
rounding, those of a plain forward pass over the whole sequence.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dmr_pipeline.agent.logits import decoder_of, logits_of
from dmr_pipeline.errors import UserError

SMALLEST_STORAGE = 256
"""Token positions that a cache starts with; doubled whenever they do not suffice."""
_FORCE_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"
"""The variable that transformers' attention reads in each forward pass."""
_PADDING_WORTH_A_PASS = 256
"""Padded tokens that cost about as much as another forward pass."""


class TokenStreams(Protocol):
    """A batch of token sequences that only grow at their ends (or are cut there)."""

    capacity: int
    """Tokens that one sequence may have."""
    cuts: bool
    """Whether a sequence that is cut goes on from there, and nothing is read again."""

    @property
    def texts(self) -> Sequence[list[int]]:
        """Token ids in each slot, not to be changed from outside."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens in each slot."""
        ...

    def reset(self, slots: Sequence[int]) -> None: ...

    def truncate(self, slot: int, length: int) -> None: ...

    def copy(self, source: int, target: int, length: int) -> None: ...

    def extend(
        self, slots: Sequence[int], chunks: Sequence[Sequence[int]], counts: Sequence[int] | None = None
    ) -> Tensor: ...

    def read(
        self, slots: Sequence[int], chunks: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> tuple[Tensor, Tensor]: ...


class _RowCache(Cache):
    """Keys and values of all rows, one tensor [rows, key-value heads, positions, head width] a layer.

    A forward pass takes the first n rows: its tokens are stored at `write`, and the first `read` positions of these
    rows are attended to. What is read is a view, never a copy. Positions not yet written hold zeros: even masked, a NaN
    would spread.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.capacity = capacity
        self.positions = min(SMALLEST_STORAGE, capacity)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.write: tuple[Tensor, Tensor, Tensor]
        """Row, index in the chunk, and position of every new token that is not padding."""
        self.read = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: store its new [n, heads, chunk, width], return [n, heads, read, width]."""
        if layer_idx == len(self.keys):
            for store, new in ((self.keys, key_states), (self.values, value_states)):
                store.append(new.new_zeros(self.rows, new.shape[1], self.positions, new.shape[3]))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        rows, indices, positions = self.write
        keys[rows, :, positions] = key_states[rows, :, indices]
        values[rows, :, positions] = value_states[rows, :, indices]
        count = key_states.shape[0]
        return keys[:count, :, : self.read], values[:count, :, : self.read]

    def reserve(self, positions: int) -> None:
        if positions > self.positions:
            positions = max(positions, min(2 * self.positions, self.capacity))
            for store in (self.keys, self.values):
                for layer, old in enumerate(store):
                    if old.shape[2] < positions:  # else it has grown before the memory ran out for another one
                        store[layer] = old.new_zeros(*old.shape[:2], positions, old.shape[3])
                        store[layer][:, :, : old.shape[2]] = old
            self.positions = positions

    def copy_rows(self, sources: list[int], targets: list[int], positions: int) -> None:
        """Overwrite the first `positions` of the target rows; sources are read before anything is written."""
        for store in (self.keys, self.values):
            for tensor in store:
                tensor[targets, :, :positions] = tensor[sources, :, :positions]


class Texts:
    """What each sequence holds, for streams that are cut by forgetting their ends.

    Args:
        slots: number of sequences.
        capacity: tokens that one sequence may have.
        beside: streams of another model of the same shape, whose sequences these are too.
    """

    cuts = True

    def __init__(self, slots: int, capacity: int, beside: "Texts | None" = None) -> None:
        self.capacity = capacity
        self.texts: list[list[int]] = [[] for _ in range(slots)] if beside is None else beside.texts
        """Token ids in each slot."""
        self.readers: list[bytearray] = [bytearray() for _ in range(slots)] if beside is None else beside.readers
        """`reader` of the model that read each of them."""
        self.reader: int = 0 if beside is None else beside.reader + 1

    @property
    def lengths(self) -> list[int]:
        """Tokens in each slot."""
        return [len(text) for text in self.texts]

    def reset(self, slots: Sequence[int]) -> None:
        """Empty these slots."""
        for slot in slots:
            self.truncate(slot, 0)

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first `length` tokens of a slot."""
        refuse_bad_cut(slot, self.texts[slot], length)
        del self.texts[slot][length:], self.readers[slot][length:]

    @contextmanager
    def _whole(self, slots: Sequence[int]) -> Iterator[None]:
        """Where a pass that appends to these slots fails, they hold what they held before: keys and values of the rest may not
        have been written."""
        held = {slot: len(self.texts[slot]) for slot in slots}
        try:
            yield
        except BaseException:
            for slot, length in held.items():
                self.truncate(slot, length)
            raise

    def _append(self, slots: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
        for slot, chunk in zip(slots, chunks, strict=True):
            self.texts[slot] += chunk
            self.readers[slot] += bytes([self.reader]) * len(chunk)

    def _copy_text(self, source: int, target: int, length: int) -> None:
        self.texts[target][:] = self.texts[source][:length]
        self.readers[target][:] = self.readers[source][:length]


class Streams(Texts):
    """A batch of token sequences that only grow at their ends (or are cut there).

    A slot is the caller's name for a sequence, 0 to `slots` - 1. Inside, the sequences of a call are moved to the first
    rows of the cache, so that attention reads them without a copy; calls for the same slots, or for fewer and fewer of
    them (as in generation), move next to nothing.

    Args:
        model: a causal LM whose layers attend to all tokens or to a sliding window of them, float or quantized. It is put
            into evaluation mode.
        slots: number of sequences.
        capacity: tokens that one sequence may have; memory is taken as the longest sequence needs it.
        beside: streams of another model of the same shape, whose cache these use too.

    Raises:
        UserError: the model has layers of another kind.
    """

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int, beside: "Streams | None" = None) -> None:
        windows = attention_windows(model.config)
        if windows is None:
            raise UserError(
                f"model type {model.config.model_type!r}: some layers attend neither to all tokens nor to a sliding window,"
                " which caching of ragged rows needs"
            )
        self._windows = windows
        super().__init__(slots, capacity, beside)
        self.model = model.eval()
        self._cache: _RowCache = _RowCache(slots, capacity) if beside is None else beside._cache
        self._row_of: list[int] = list(range(slots)) if beside is None else beside._row_of
        self._slot_at: list[int] = list(range(slots)) if beside is None else beside._slot_at

    @property
    def storage(self) -> list[Tensor]:
        """Where keys and values lie, all slots' and all layers'."""
        return [*self._cache.keys, *self._cache.values]

    def copy(self, source: int, target: int, length: int) -> None:
        """Put the first `length` tokens of the source slot in the place of what the target slot holds."""
        refuse_bad_cut(source, self.texts[source], length)
        self._cache.copy_rows([self._row_of[source]], [self._row_of[target]], length)
        self._copy_text(source, target, length)

    @torch.no_grad()
    def extend(
        self, slots: Sequence[int], chunks: Sequence[Sequence[int]], counts: Sequence[int] | None = None
    ) -> Tensor:
        """Append a chunk of token ids, at least one, to each of these slots.

        Args:
            counts: after how many of a chunk's last tokens logits are wanted; after the last alone by default.

        Returns:
            float32 logits [len(slots) or the sum of the counts, vocabulary], chunk by chunk.

        Raises:
            UserError: a sequence would outgrow the capacity; then no slot has changed.
        """
        counts = counts or [1] * len(slots)
        hidden = self._hidden(slots, chunks)
        return logits_of(self.model, torch.cat([h[-count:] for h, count in zip(hidden, counts, strict=True)]))

    @torch.no_grad()
    def read(
        self, slots: Sequence[int], chunks: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `extend`, with the hidden states after the last token of each chunk.

        Args:
            layers: decoder layers, from 1, whose outputs are wanted.

        Returns:
            float32 logits [len(slots), vocabulary] and states [len(slots), len(layers) * hidden size], layer by layer.
        """
        last = torch.stack([hidden[-1] for hidden in self._hidden(slots, chunks, layers)])
        return logits_of(self.model, last[:, : self._width]), last[:, self._width :].float()

    def _hidden(
        self, slots: Sequence[int], chunks: Sequence[Sequence[int]], layers: Sequence[int] = ()
    ) -> list[Tensor]:
        """Append the chunks; last hidden states [len(chunk), width] of each, beside them the outputs of these layers."""
        refuse_bad_calls(self.texts, self.capacity, slots, chunks)
        cut = _first_pass([len(chunk) for chunk in chunks])
        with self._whole(slots):
            hidden = self._forward(slots, [chunk[:cut] for chunk in chunks], layers)
        rest = [index for index, chunk in enumerate(chunks) if len(chunk) > cut]
        if rest:
            more = self._hidden([slots[index] for index in rest], [chunks[index][cut:] for index in rest], layers)
            for index, states in zip(rest, more, strict=True):
                hidden[index] = torch.cat([hidden[index], states])
        return hidden

    def _forward(self, slots: Sequence[int], chunks: Sequence[Sequence[int]], layers: Sequence[int]) -> list[Tensor]:
        """One forward pass over all the chunks, padded on the right.

        A padded token has a position after its chunk: no token of the chunk attends to it, and it is not stored.
        """
        self._bring_to_front(slots)
        device, width = self.model.device, max(map(len, chunks))
        chunk_at = {self._row_of[slot]: chunk for slot, chunk in zip(slots, chunks, strict=True)}
        by_row = [chunk_at[row] for row in range(len(slots))]
        tokens = torch.tensor([[*chunk, *[0] * (width - len(chunk))] for chunk in by_row], device=device)
        sizes = torch.tensor([[len(chunk)] for chunk in by_row], device=device)
        starts = torch.tensor([[len(self.texts[slot])] for slot in self._slot_at[: len(slots)]], device=device)
        steps = torch.arange(width, device=device)
        positions = starts + steps
        rows, indices = (steps < sizes).nonzero(as_tuple=True)
        self._append(slots, chunks)

        cache = self._cache
        cache.read = max(len(self.texts[slot]) for slot in slots)
        cache.reserve(cache.read)
        cache.write = (rows, indices, positions[rows, indices])
        masks = {kind: self._mask(positions, window) for kind, window in self._windows.items()}
        with _shared_heads() if device.type == "cpu" and width > 1 else nullcontext():
            output = decoder_of(self.model)(
                input_ids=tokens,
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=bool(layers),
            )
        self._width = output.last_hidden_state.shape[-1]  # not always the layers' (OPT projects)
        hidden = torch.cat([output.last_hidden_state, *(output.hidden_states[layer] for layer in layers)], dim=-1)
        return [hidden[self._row_of[slot], : len(chunk)] for slot, chunk in zip(slots, chunks, strict=True)]

    def _mask(self, positions: Tensor, window: int | None) -> Tensor:
        """[rows, 1, tokens, keys], -inf where the token at one of these positions [rows, tokens] does not see a key.

        Additive, in the model's dtype: a boolean mask would be converted again in every layer on a CPU.
        """
        keys = torch.arange(self._cache.read, device=positions.device)
        # Padding may lie further on; it sees what the last token can see, so that no row is without any key.
        last = positions[:, None, :, None].clamp(max=self._cache.read - 1)
        unseen = keys > last if window is None else (keys > last) | (keys <= last - window)
        return torch.zeros(unseen.shape, dtype=self.model.dtype, device=positions.device).masked_fill_(
            unseen, float("-inf")
        )

    def _bring_to_front(self, slots: Sequence[int]) -> None:
        """Swap rows until those of `slots` are the first ones."""
        asked, count = set(slots), len(slots)
        inside = [row for row in range(count) if self._slot_at[row] not in asked]
        outside = [self._row_of[slot] for slot in slots if self._row_of[slot] >= count]
        if not inside:
            return
        first, second = inside + outside, outside + inside
        used = max(len(self.texts[self._slot_at[row]]) for row in first)
        self._cache.copy_rows(first, second, used)
        moved = [self._slot_at[row] for row in first]
        for slot, row in zip(moved, second, strict=True):
            self._row_of[slot], self._slot_at[row] = row, slot


def attention_windows(config: PreTrainedConfig) -> dict[str, int | None] | None:
    """For each kind of layer (`full_attention`, `sliding_attention`) the tokens that a token sees, itself among them, or None
    for all before it; None for the whole where a layer is of another kind."""
    decoder = config.get_text_config(decoder=True)
    if "local" in getattr(decoder, "attention_layers", ()):
        return None  # GPT-Neo's layers mask by themselves, as if each row ended where the longest does
    layers = DynamicCache(config=decoder).layers
    kinds = decoder.layer_types if getattr(decoder, "layer_types", None) else [None] * len(layers)
    windows: dict[str, int | None] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        if type(layer) is DynamicLayer and kind in (None, "full_attention"):
            windows["full_attention"] = None
        elif (
            type(layer) is DynamicSlidingWindowLayer
            and kind in (None, "sliding_attention")
            and layer.sliding_window == getattr(decoder, "sliding_window", None)
        ):
            windows["sliding_attention"] = layer.sliding_window
        else:
            return None
    return windows


def refuse_bad_calls(
    texts: Sequence[Sequence[int]], capacity: int, slots: Sequence[int], chunks: Sequence[Sequence[int]]
) -> None:
    """
    Raises:
        UserError: a sequence would outgrow the capacity.
        ValueError: a slot is named twice, or a chunk is empty.
    """
    longest = max(len(texts[slot]) + len(chunk) for slot, chunk in zip(slots, chunks, strict=True))
    if longest > capacity:
        raise UserError(
            f"a token sequence would grow to {longest} tokens, but its stream holds {capacity}: set"
            " agent.max_transcript_tokens in the recipe higher, or shorten the episodes (benchmark.step_limit)"
        )
    if len(set(slots)) < len(slots) or not all(chunks):
        raise ValueError("slots must be distinct and chunks not empty")


def refuse_bad_cut(slot: int, text: Sequence[int], length: int) -> None:
    """Only what is there can be cut.

    Raises:
        ValueError: a slot that holds this text cannot be cut to so many tokens.
    """
    if not 0 <= length <= len(text):
        raise ValueError(f"slot {slot} has {len(text)} tokens, it cannot be cut to {length}")


def _first_pass(lengths: list[int]) -> int:
    """Tokens of each chunk that go into one padded pass; the rest of the longer chunks follows in passes of fewer rows.

    Streams that catch up on many tokens would otherwise make all the others carry their padding.
    """
    longest = max(lengths)
    saved, cut = max((rows * (longest - length), length) for rows, length in enumerate(sorted(lengths), start=1))
    return cut if saved > _PADDING_WORTH_A_PASS else longest


@contextmanager
def _shared_heads() -> Iterator[None]:
    """Chunks on a CPU: let torch's masked attention share the key-value heads, which transformers would copy.

    A third of the time at a long context. For single tokens transformers has a faster way of its own; on a GPU torch's
    masked attention cannot share heads.
    """
    before = os.environ.get(_FORCE_GQA, "0")
    os.environ[_FORCE_GQA] = "1"
    try:
        yield
    finally:
        os.environ[_FORCE_GQA] = before
