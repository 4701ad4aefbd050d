"""Growing token sequences over any causal LM, by the cache that the model makes itself: exact, one sequence a pass.

For models whose layers keep something else than keys and values of all tokens (recurrent and convolutional states), or whose
attention does not take the masks of `Streams`. A recurrent state cannot be cut back, so each sequence keeps the state that it
had after its last longer chunk: where it is cut, it goes on from there, or is read again from its start.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dmr_pipeline.agent.logits import decoder_of, logits_of
from dmr_pipeline.rollout.kv_cache.padded import refuse_bad_calls, refuse_bad_cut


@dataclass
class _Text:
    """One sequence. Its cache may lag behind its tokens; what is missing is read with the next chunk."""

    tokens: list[int] = field(default_factory=list)
    cache: Cache | None = None
    cached: int = 0
    """Tokens that the cache has read."""
    kept: Cache | None = None
    """Never changed, only copied."""
    kept_cached: int = 0

    def cut(self, length: int) -> None:
        del self.tokens[length:]
        if self.cached > length:
            self.cache, self.cached = None, 0
        if self.kept_cached > length:
            self.kept, self.kept_cached = None, 0

    def copied(self, length: int) -> "_Text":
        text = _Text(list(self.tokens), copy.deepcopy(self.cache), self.cached, self.kept, self.kept_cached)
        text.cut(length)
        return text


class PlainStreams:
    """`TokenStreams` by the model's own cache.

    Args:
        model: a causal LM, float or quantized. It is put into evaluation mode.
        chunks: whether its cache can go on with several tokens at once; without, they are read one by one.
    """

    cuts = False

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int, chunks: bool = True) -> None:
        self.model = model.eval()
        self.capacity = capacity
        self.chunks = chunks
        self._texts = [_Text() for _ in range(slots)]
        known = inspect.signature(decoder_of(model).forward).parameters
        self._cache_name = "cache_params" if "cache_params" in known else "past_key_values"

    @property
    def texts(self) -> list[list[int]]:
        """Token ids in each slot."""
        return [text.tokens for text in self._texts]

    @property
    def lengths(self) -> list[int]:
        """Tokens in each slot."""
        return [len(text.tokens) for text in self._texts]

    def reset(self, slots: Sequence[int]) -> None:
        """Empty these slots."""
        for slot in slots:
            self._texts[slot] = _Text()

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first `length` tokens of a slot."""
        refuse_bad_cut(slot, self._texts[slot].tokens, length)
        self._texts[slot].cut(length)

    def copy(self, source: int, target: int, length: int) -> None:
        """As `Streams.copy`."""
        refuse_bad_cut(source, self._texts[source].tokens, length)
        self._texts[target] = self._texts[source].copied(length)

    @torch.no_grad()
    def extend(
        self, slots: Sequence[int], chunks: Sequence[Sequence[int]], counts: Sequence[int] | None = None
    ) -> Tensor:
        """As `Streams.extend`."""
        refuse_bad_calls(self.texts, self.capacity, slots, chunks)
        parts = zip(slots, chunks, counts or [1] * len(slots), strict=True)
        hidden = [self._hidden(slot, chunk, keep=count == 1)[-count:] for slot, chunk, count in parts]
        return logits_of(self.model, torch.cat(hidden))

    @torch.no_grad()
    def read(
        self, slots: Sequence[int], chunks: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `Streams.read`."""
        refuse_bad_calls(self.texts, self.capacity, slots, chunks)
        parts = zip(slots, chunks, strict=True)
        last = torch.cat([self._hidden(slot, chunk, layers)[-1:] for slot, chunk in parts])
        return logits_of(self.model, last[:, : self._width]), last[:, self._width :].float()

    def _hidden(self, slot: int, chunk: Sequence[int], layers: Sequence[int] = (), keep: bool = True) -> Tensor:
        """Append the chunk; last hidden states [tokens read, width], beside them the outputs of these layers."""
        text = self._texts[slot]
        held = len(text.tokens)
        try:
            return self._appended(text, chunk, layers, keep)
        except BaseException:  # what it keeps may have been changed in part
            text.cache, text.cached = None, 0
            del text.tokens[held:]
            raise

    def _appended(self, text: _Text, chunk: Sequence[int], layers: Sequence[int], keep: bool) -> Tensor:
        text.tokens += chunk
        if text.cache is None and text.kept is not None:
            text.cache, text.cached = copy.deepcopy(text.kept), text.kept_cached
        new = text.tokens[text.cached :]
        whole = self.chunks or text.cached == 0
        hidden = torch.cat(
            [self._pass(text, part, layers) for part in ([new] if whole else [[token] for token in new])]
        )
        if keep and len(chunk) > 1:
            text.kept, text.kept_cached = text.cache, text.cached
            text.cache, text.cached = None, 0
        return hidden

    def _pass(self, text: _Text, tokens: list[int], layers: Sequence[int]) -> Tensor:
        output = decoder_of(self.model)(
            input_ids=torch.tensor([tokens], device=self.model.device),
            **{self._cache_name: text.cache},
            use_cache=True,
            output_hidden_states=bool(layers),
        )
        text.cache, text.cached = output[self._cache_name], text.cached + len(tokens)
        self._width = output.last_hidden_state.shape[-1]  # not always the layers' (OPT projects)
        return torch.cat([output.last_hidden_state, *(output.hidden_states[layer] for layer in layers)], dim=-1)[0]
