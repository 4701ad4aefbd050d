"""Growing token sequences over a model of the Llama family, without padding: a long sequence costs itself alone.

The new tokens of all sequences of a call go through the layers as one packed row, so that every matrix product is as wide as
there are tokens. Each sequence attends to its own cached positions, together with its neighbours where that is cheaper. The
layers are computed here, from the model's own weights and modules, with fewer operations than a model has that must also
train; `choice.way_of` tries whether the outcome is the model's.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel

from dmr_pipeline.agent.logits import decoder_of
from dmr_pipeline.rollout.kv_cache.padded import (
    SMALLEST_STORAGE,
    Texts,
    attention_windows,
    refuse_bad_calls,
    refuse_bad_cut,
)

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are those of `_Layer`."""


@dataclass(frozen=True)
class _Prices:
    """What attention costs, in microseconds: only their ratios matter. Measured for heads of width 64."""

    call: float
    """One call, whatever it reads."""
    position: float
    """Reading one cached position of a sequence."""
    score: float
    """Comparing one head of one new token with one position."""


_PRICES = {"cpu": _Prices(call=40.0, position=0.06, score=0.006), "cuda": _Prices(call=60.0, position=1e-5, score=1e-5)}


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows of the cache that attend in one call."""

    rows: slice
    tokens: slice
    """Of the packed row."""
    width: int
    """New tokens of the row that has most."""
    read: int
    """Cached positions that are attended to, the new ones included."""
    cells: Tensor | None
    """Where each token lies in [rows * width], None where every row has `width` tokens."""
    masks: dict[str, Tensor | None]
    """By the kind of layer: [rows, 1, query heads a key-value head * width, read], -inf where a token does not see a
    position; None where all see all."""


@dataclass
class _Storage:
    """Keys and values of all layers and slots."""

    positions: int = 0
    """Of each slot."""
    layers: list[Tensor] = field(default_factory=list)
    """[2, slots, key-value heads, positions, head width] each. What is not written yet is finite: even masked, a NaN would
    spread."""
    rotations: Tensor = field(default_factory=lambda: torch.empty(0))


class PackedStreams(Texts):
    """`TokenStreams` of a model of FAMILY. A slot's number is its row in the cache.

    Args:
        model: float or quantized. It is put into evaluation mode. Its weights may not change while this is used.
        slots: number of sequences.
        capacity: tokens that one sequence may have; memory is taken as they grow.
        beside: streams of another model of the same shape, whose cache these use too.

    Raises:
        ValueError: the model's layers are of another kind.
    """

    def __init__(
        self, model: PreTrainedModel, slots: int, capacity: int, beside: "PackedStreams | None" = None
    ) -> None:
        windows = attention_windows(model.config)
        if model.config.model_type not in FAMILY or windows is None:
            raise ValueError(
                f"model type {model.config.model_type!r} has layers of another kind than {', '.join(FAMILY)}"
            )
        super().__init__(slots, capacity, beside)
        self.model = model.eval()
        self._windows = windows
        self._decoder = cast(Any, decoder_of(model))
        kinds = model.config.layer_types if len(windows) > 1 else list(windows) * len(self._decoder.layers)
        self._layers = [_Layer(layer, kind) for layer, kind in zip(self._decoder.layers, kinds, strict=True)]
        self._shared = self._layers[0].heads // self._layers[0].key_value_heads
        self._prices = _PRICES[model.device.type]
        self._storage: _Storage = _Storage() if beside is None else beside._storage
        self._reserve(min(capacity, SMALLEST_STORAGE))

    @property
    def storage(self) -> list[Tensor]:
        """As `Streams.storage`."""
        return self._storage.layers

    @torch.no_grad()
    def copy(self, source: int, target: int, length: int) -> None:
        """As `Streams.copy`."""
        refuse_bad_cut(source, self.texts[source], length)
        for stored in self._storage.layers:
            stored[:, target, :, :length] = stored[:, source, :, :length]
        self._copy_text(source, target, length)

    @torch.no_grad()
    def extend(
        self, slots: Sequence[int], chunks: Sequence[Sequence[int]], counts: Sequence[int] | None = None
    ) -> Tensor:
        """As `Streams.extend`."""
        refuse_bad_calls(self.texts, self.capacity, slots, chunks)
        with self._whole(slots):
            return self._logits(self._forward(slots, chunks, counts or [1] * len(slots))[0])

    @torch.no_grad()
    def read(
        self, slots: Sequence[int], chunks: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `Streams.read`."""
        refuse_bad_calls(self.texts, self.capacity, slots, chunks)
        with self._whole(slots):
            hidden, states = self._forward(slots, chunks, [1] * len(slots), layers)
        return self._logits(hidden), torch.cat(states, dim=-1).float()

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits.float()

    def _forward(
        self,
        slots: Sequence[int],
        chunks: Sequence[Sequence[int]],
        wanted: Sequence[int],
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Append the chunks.

        Args:
            wanted: at how many of a chunk's last tokens something is asked for.

        Returns:
            The decoder's hidden states at those tokens, in the order of the chunks, and the outputs of these layers there.
        """
        device = self.model.device
        order = sorted(range(len(slots)), key=lambda i: slots[i])
        rows, sizes = [slots[i] for i in order], [len(chunks[i]) for i in order]
        starts, ends = [len(self.texts[row]) for row in rows], list(accumulate(sizes))
        self._append(slots, chunks)
        self._reserve(max(len(self.texts[row]) for row in rows))
        end_of = dict(zip(order, ends, strict=True))
        picked = [end_of[i] - count + t for i, count in enumerate(wanted) for t in range(count)]
        # One copy to the device for all that a pass needs to know of its tokens.
        tokens, positions, at_rows = torch.tensor(
            [
                [token for i in order for token in chunks[i]],
                [start + t for start, size in zip(starts, sizes, strict=True) for t in range(size)],
                [row for row, size in zip(rows, sizes, strict=True) for _ in range(size)],
            ]
        ).to(device)
        groups = self._groups(rows, starts, sizes, ends)
        chosen, last = torch.tensor(picked).to(device), len(self._layers)

        cosines, sines = self._storage.rotations[:, positions]
        x = self._decoder.embed_tokens(tokens)
        states: dict[int, Tensor] = {}
        for number, (layer, stored) in enumerate(zip(self._layers, self._storage.layers, strict=True), start=1):
            queries, keys, values = layer.before(x, cosines, sines)
            stored[0][at_rows, :, positions] = keys
            stored[1][at_rows, :, positions] = values
            read = torch.cat([self._attend(stored, layer, group, queries) for group in groups])
            if number == last:
                x, read = x[chosen], read[chosen]  # nothing reads the others' outputs
            x = layer.after(x, read)
            if number in layers and number < last:
                states[number] = x[chosen]
        states[last] = hidden = _normed(x, self._decoder.norm)  # as transformers has the last layer's
        return hidden, [states[number] for number in layers]

    def _attend(self, stored: Tensor, layer: "_Layer", group: _Group, queries: Tensor) -> Tensor:
        """What the tokens of one group read: [tokens, heads * head width], of queries [packed tokens, heads, head width]."""
        keys, values = stored[:, group.rows, :, : group.read]
        rows, heads, _, head_width = keys.shape
        width, shared = group.width, self._shared
        asked = queries[group.tokens]
        if group.cells is not None:
            asked = asked.new_zeros(rows * width, *asked.shape[1:]).index_copy_(0, group.cells, asked)
        # The query heads that share a key-value head become rows of one matrix, so that its keys are read once.
        asked = asked.reshape(rows, width, heads, shared, head_width)
        if width > 1:
            asked = asked.permute(0, 2, 3, 1, 4)
        asked = asked.reshape(rows, heads, shared * width, head_width)
        found = scaled_dot_product_attention(asked, keys, values, attn_mask=group.masks[layer.kind], scale=layer.scale)
        if width > 1:
            found = found.view(rows, heads, shared, width, head_width).permute(0, 3, 1, 2, 4)
        found = found.reshape(rows * width, -1)
        return found if group.cells is None else found[group.cells]

    def _groups(self, rows: list[int], starts: list[int], sizes: list[int], ends: list[int]) -> list[_Group]:
        """Each row together with the one before it, where one call for both is cheaper than two."""
        prices = self._prices

        def price(first: int, last: int, width: int, read: int) -> float:
            count = rows[last] - rows[first] + 1
            return prices.call + count * read * (prices.position + prices.score * width * self._shared)

        firsts, width, read, so_far = [0], sizes[0], starts[0] + sizes[0], price(0, 0, sizes[0], starts[0] + sizes[0])
        shapes = []
        for i in range(1, len(rows)):
            alone = price(i, i, sizes[i], starts[i] + sizes[i])
            wider, further = max(width, sizes[i]), max(read, starts[i] + sizes[i])
            together = price(firsts[-1], i, wider, further)
            if together <= so_far + alone:
                width, read, so_far = wider, further, together
            else:
                shapes.append((width, read))
                firsts.append(i)
                width, read, so_far = sizes[i], starts[i] + sizes[i], alone
        shapes.append((width, read))
        return [
            self._group(rows[a:b], starts[a:b], sizes[a:b], slice(ends[a] - sizes[a], ends[b - 1]), *shape)
            for (a, b), shape in zip(pairwise([*firsts, len(rows)]), shapes, strict=True)
        ]

    def _group(
        self, rows: list[int], starts: list[int], sizes: list[int], tokens: slice, width: int, read: int
    ) -> _Group:
        device = self.model.device
        top, count = rows[0], rows[-1] - rows[0] + 1
        cells = None
        if len(rows) < count or min(sizes) < width:
            at = [(row - top) * width + t for row, size in zip(rows, sizes, strict=True) for t in range(size)]
            cells = torch.tensor(at).to(device)
        masks: dict[str, Tensor | None] = {}
        for kind, window in self._windows.items():
            if width == 1 and min(starts) + 1 == read and (window is None or read <= window):
                masks[kind] = None
                continue
            before = [0] * count
            for row, start in zip(rows, starts, strict=True):
                before[row - top] = start
            masks[kind] = self._mask(torch.tensor(before).to(device), width, read, window)
        return _Group(slice(top, top + count), tokens, width, read, cells, masks)

    def _mask(self, before: Tensor, width: int, read: int, window: int | None) -> Tensor:
        """Additive, in the model's dtype: a boolean mask would be converted again in every layer on a CPU."""
        # Cells without a token see what the last token can see, so that none is without any position.
        last = (before[:, None] + torch.arange(width, device=before.device)).clamp_(max=read - 1)[:, :, None]
        positions = torch.arange(read, device=before.device)
        unseen = positions > last if window is None else (positions > last) | (positions <= last - window)
        mask = torch.zeros(unseen.shape, dtype=self.model.dtype, device=before.device).masked_fill_(unseen, -torch.inf)
        return mask.repeat(1, self._shared, 1)[:, None]

    def _reserve(self, positions: int) -> None:
        """Have room for so many positions in each row."""
        storage = self._storage
        if positions <= storage.positions:
            return
        device, dtype, first = self.model.device, self.model.dtype, self._layers[0]
        # On a CPU memory is taken where it is written: all positions are there from the start, and none is ever moved.
        room = self.capacity if device.type == "cpu" else min(max(positions, 2 * storage.positions), self.capacity)
        shape = (2, len(self.texts), first.key_value_heads, room, first.head_width)
        for number in range(len(self._layers)):
            new = _zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
            if number < len(storage.layers):
                old = storage.layers[number]
                kept = min(room, old.shape[3])  # it has grown further before the memory ran out for another one
                new[:, :, :, :kept] = old[:, :, :, :kept]
                storage.layers[number] = new
            else:
                storage.layers.append(new)
        probe = torch.zeros(1, dtype=dtype, device=device)
        with torch.no_grad():
            cosines, sines = self._decoder.rotary_emb(probe, torch.arange(room, device=device)[None])
        sines = torch.cat((-sines[0, :, : first.head_width // 2], sines[0, :, first.head_width // 2 :]), dim=-1)
        storage.rotations = torch.stack((cosines[0], sines))[:, :, None]
        storage.positions = room  # last: before, not all of it is there


class _Layer:
    """A decoder layer of FAMILY: what comes before its attention, and what comes after."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        self.kind = kind
        layer = cast(Any, module)
        self._layer, attention = layer, layer.self_attn
        self._attention, config = attention, attention.config
        self.scale: float = attention.scaling
        self.head_width: int = attention.head_dim
        self.heads: int = config.num_attention_heads
        self.key_value_heads: int = config.num_key_value_heads
        self._norm_weights: Tensor | None = None
        if config.model_type == "qwen3":
            norms = [attention.q_norm] * self.heads + [attention.k_norm] * self.key_value_heads
            self._norm_weights = torch.stack([norm.weight.detach() for norm in norms])
            self._norm_eps: float = attention.q_norm.variance_epsilon

    def before(self, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [tokens, heads, head width], keys and values [tokens, key-value heads, head width].

        Args:
            cosines: of the rotary embedding, [tokens, 1, head width].
            sines: as these, negative in the first half.
        """
        attention, width = self._attention, self.head_width
        normed = _normed(x, self._layer.input_layernorm)
        # Queries and keys are normed and rotated together.
        both = torch.cat((attention.q_proj(normed), attention.k_proj(normed)), dim=-1).view(len(x), -1, width)
        if self._norm_weights is not None:
            both = rms_norm(both, (width,), None, self._norm_eps) * self._norm_weights
        both = torch.addcmul(both * cosines, both.roll(width // 2, -1), sines)
        values = attention.v_proj(normed).view(len(x), -1, width)
        return both[:, : self.heads], both[:, self.heads :], values

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        x = x + self._attention.o_proj(read)
        return x + self._layer.mlp(_normed(x, self._layer.post_attention_layernorm))


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    return rms_norm(x, x.shape[-1:], cast(Tensor, norm.weight), cast(float, norm.variance_epsilon))


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """On the CPU, in memory that the system hands out page by page as it is written (torch would write all of it)."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # forked processes have each their own
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, private), dtype=dtype).view(*shape)
