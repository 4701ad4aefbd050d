from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    PreTrainedModel,
)

from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.kv_cache import packed
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.kv_cache.plain import PlainStreams
from tests.helpers.causal_lms import MODELS, VOCABULARY, assert_close, uncached
from tests.helpers.kinds import model_of

chunk = st.one_of(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9),
    st.integers(0, 1000).map(
        lambda seed: [(seed + 7 * i) % VOCABULARY for i in range(150)]
    ),  # makes passes of fewer rows
)
calls = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["extend", "everywhere"]), st.dictionaries(st.integers(0, 4), chunk, min_size=1)),
        st.tuples(st.just("truncate"), st.tuples(st.integers(0, 4), st.floats(0, 1))),
        st.tuples(st.just("reset"), st.lists(st.integers(0, 4), max_size=2)),
        st.tuples(st.just("copy"), st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(0, 1))),
    ),
    min_size=2,
    max_size=12,
)


@pytest.mark.parametrize("kind", [Streams, PackedStreams])
@pytest.mark.parametrize("model", MODELS, ids=["qwen3-tied", "qwen3", "llama"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=calls)
def test_any_interleaving_equals_plain_forward_passes(kind: type, model: PreTrainedModel, calls: list) -> None:
    streams, texts = kind(model, slots=5, capacity=2000), [[] for _ in range(5)]
    for call, argument in calls:
        match call:
            case "extend" | "everywhere":
                slots, chunks = list(argument), list(argument.values())
                counts = [1 if call == "extend" else len(chunk) for chunk in chunks]
                rows = streams.extend(slots, chunks, None if call == "extend" else counts)
                for slot, new, found in zip(slots, chunks, rows.split(counts), strict=True):
                    texts[slot] = [*texts[slot], *new]
                    assert_close(found, uncached(model, texts[slot])[-len(found) :])
            case "truncate":
                slot, share = argument
                texts[slot] = texts[slot][: int(share * len(texts[slot]))]
                streams.truncate(slot, len(texts[slot]))
            case "reset":
                streams.reset(argument)
                for slot in argument:
                    texts[slot] = []
            case "copy":
                source, target, share = argument
                length = int(share * len(texts[source]))
                streams.copy(source, target, length)
                texts[target] = texts[source][:length]
        assert streams.lengths == [len(text) for text in texts]


@pytest.mark.parametrize("kind", [Streams, PackedStreams])
@pytest.mark.parametrize("model", MODELS, ids=["qwen3-tied", "qwen3", "llama"])
def test_greedy_generation_equals_generate(kind: type, model: PreTrainedModel) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
    streams = kind(model, slots=4, capacity=64)
    logits = streams.extend(range(4), prompts)
    generated: list[list[int]] = [[] for _ in prompts]
    wanted = [8, 3, 12, 5]  # rows leave the batch one after another
    active = list(range(4))
    while active:
        for slot, token in zip(active, logits.argmax(-1).tolist(), strict=True):
            generated[slot].append(token)
        active = [slot for slot in active if len(generated[slot]) < wanted[slot]]
        if active:
            logits = streams.extend(active, [generated[slot][-1:] for slot in active])
    for prompt, tokens, count in zip(prompts, generated, wanted, strict=True):
        alone = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert alone[0, len(prompt) :].tolist() == tokens


@pytest.mark.parametrize("kind", [Streams, PackedStreams])
def test_grows_up_to_its_capacity_and_refuses_more_without_a_change(kind: type) -> None:
    streams = kind(MODELS[0], slots=2, capacity=601)
    text = [i % VOCABULARY for i in range(601)]
    for start in range(0, 600, 200):
        logits = streams.extend([1], [text[start : start + 200]])
    assert_close(logits[0], uncached(MODELS[0], text[:600])[-1])
    with pytest.raises(UserError, match=r"602 tokens.*holds 601.*max_transcript_tokens"):
        streams.extend([0, 1], [[1], [1, 2]])
    assert streams.lengths == [0, 600]
    assert_close(streams.extend([1], [text[600:]])[0], uncached(MODELS[0], text)[-1])


def test_pads_beyond_the_capacity_are_harmless() -> None:
    streams = Streams(MODELS[0], slots=2, capacity=40)
    streams.extend([0], [list(range(39))])
    logits = streams.extend([0, 1], [[7], list(range(30))])
    assert_close(logits[0], uncached(MODELS[0], [*range(39), 7])[-1])
    assert_close(logits[1], uncached(MODELS[0], list(range(30)))[-1])


def test_bad_calls_are_refused() -> None:
    streams = Streams(MODELS[0], slots=2, capacity=40)
    with pytest.raises(ValueError, match="not empty"):
        streams.extend([0, 1], [[1], []])
    with pytest.raises(ValueError, match="distinct"):
        streams.extend([0, 0], [[1], [1]])
    with pytest.raises(ValueError, match="cannot be cut"):
        streams.truncate(0, 1)
    with pytest.raises(
        UserError, match=r"'qwen3_5_text': some layers attend neither to all tokens nor to a sliding window"
    ):
        Streams(model_of("qwen3.5"), slots=1, capacity=8)


@pytest.mark.parametrize("kind", [Streams, PackedStreams, PlainStreams])
@pytest.mark.parametrize("layer", [0, 1])
def test_after_a_pass_that_failed_all_is_as_before_it(kind: type, layer: int) -> None:
    """Out of memory, say: keys and values of some layers are written by then, those of others are not."""
    model, streams = MODELS[0], kind(MODELS[0], slots=3, capacity=600)
    streams.extend([0, 1], [[1, 2, 3], [4, 5]])

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    failing = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            streams.extend([0, 1, 2], [[6, 7], [i % VOCABULARY for i in range(300)], [9]])
        with pytest.raises(torch.OutOfMemoryError):
            streams.read([0], [[6, 7]], [1])
    finally:
        failing.remove()
    assert streams.lengths == [3, 2, 0]
    streams.copy(0, 2, 3)
    logits = streams.extend([0, 1, 2], [[8], [6, 7], [9, 9]])
    for found, text in zip(logits, ([1, 2, 3, 8], [4, 5, 6, 7], [1, 2, 3, 9, 9]), strict=True):
        assert_close(found, uncached(model, text)[-1])


@pytest.mark.parametrize("kind", [Streams, PackedStreams])
def test_a_cache_that_could_not_grow_is_as_large_as_it_was(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = kind(MODELS[0], slots=1, capacity=600)
    text = [i % VOCABULARY for i in range(500)]
    streams.extend([0], [text[:200]])
    failing = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    with monkeypatch.context() as patched:
        if kind is Streams:
            patched.setattr(torch.Tensor, "new_zeros", failing)
        else:
            streams._storage.positions = 256  # on a CPU there is room for all from the start
            patched.setattr(packed, "_zeros", failing)
        with pytest.raises(torch.OutOfMemoryError):
            streams.extend([0], [text[200:]])
    assert streams.lengths == [200]
    assert_close(streams.extend([0], [text[200:]])[0], uncached(MODELS[0], text)[-1])
