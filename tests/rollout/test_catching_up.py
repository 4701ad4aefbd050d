"""Streams that lag behind their texts."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmr_pipeline.rollout.kv_cache.catching_up import catch_up
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.kv_cache.plain import PlainStreams
from tests.helpers.causal_lms import MODELS, assert_close, uncached

few_tokens = st.lists(st.integers(0, 1), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", [Streams, PackedStreams, PlainStreams])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    held=st.lists(few_tokens, min_size=4, max_size=4), texts=st.dictionaries(st.integers(0, 3), few_tokens, min_size=1)
)
@torch.no_grad()
def test_what_any_slot_holds_is_not_read_again(kind: type, held: list[list[int]], texts: dict[int, list[int]]) -> None:
    streams = kind(MODELS[0], 4, 64)
    streams.extend(range(4), held)
    first, text = next(iter(texts.items()))
    sources = held if streams.cuts else [held[first]]
    known = max(n for n in range(len(text)) if any(source[:n] == text[:n] for source in sources))
    left = catch_up(streams, list(texts), list(texts.values()))
    assert left[0] == text[known:], "the first of them, before anything was overwritten"
    for (slot, text), rest in zip(texts.items(), left, strict=True):
        assert rest
        assert streams.texts[slot] + rest == text
    for text, logits in zip(texts.values(), streams.extend(list(texts), left), strict=True):
        assert_close(logits, uncached(MODELS[0], text)[-1])


@pytest.mark.parametrize("kind", [Streams, PackedStreams, PlainStreams])
def test_a_copy_of_more_than_there_is_is_refused(kind: type) -> None:
    streams = kind(MODELS[0], 2, 8)
    streams.extend([0], [[1, 2, 3]])
    with pytest.raises(ValueError, match="slot 0 has 3 tokens, it cannot be cut to 4"):
        streams.copy(0, 1, 4)
