"""Every kind of model against its own forward passes without any cache, through whatever way of caching it gets."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoConfig, MistralConfig, PreTrainedModel, Qwen3Config

from dmr_pipeline.agent.logits import TEXTS, some_tokens
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.agent import DEFAULT_TRANSCRIPT_TOKENS
from dmr_pipeline.rollout.kv_cache import choice as caching
from dmr_pipeline.rollout.kv_cache.choice import positions_of, rows_that_fit, token_streams, transcript_capacity, way_of
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.kv_cache.plain import PlainStreams
from tests.helpers.kinds import KINDS, POSITIONS, VOCABULARY, WINDOW, model_of

SLOTS = 3
LAYERS = (1, 2)
PACKED = ["qwen3", "qwen2", "llama", "mistral", "dynamic-ntk", "yarn"]
BATCHED = [
    "granite", "cohere", "gpt2", "gpt-neox", "opt", "falcon", "phi3", "gemma2", "gemma3", "gemma4", "olmo3", "cohere2",
    "gpt-oss", "bert-decoder",
]  # fmt: skip
PLAIN = ["bloom", "falcon-alibi", "gpt-neo", "qwen3-next", "qwen3.5", "falcon-h1"]
TOKEN_BY_TOKEN = ["mamba"]
REFUSED = ["recurrent-gemma", "bert"]


def test_every_kind_is_tried() -> None:
    assert sorted(PACKED + BATCHED + PLAIN + TOKEN_BY_TOKEN + REFUSED) == sorted(KINDS)


@torch.no_grad()
def uncached(model: PreTrainedModel, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Logits at all tokens, and the states of LAYERS after the last."""
    output = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    return output.logits[0], torch.cat([output.hidden_states[layer][0, -1] for layer in LAYERS])


def assert_random_calls_equal_plain_forward_passes(model: PreTrainedModel, tolerance: float = 2e-4) -> None:
    def assert_close(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)

    rng = random.Random(0)
    streams, texts = token_streams(model, SLOTS, POSITIONS), [[] for _ in range(SLOTS)]
    made = set()
    for _ in range(40):
        call = rng.choice(["extend", "extend", "everywhere", "read", "generate", "branch", "truncate", "copy", "reset"])
        made.add(call)
        slots = rng.sample(range(SLOTS), rng.randint(1, SLOTS))
        for slot in slots:
            if len(texts[slot]) > POSITIONS - 40:
                streams.reset([slot])
                texts[slot] = []
        chunks = [[rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, WINDOW - 1, 13]))] for _ in slots]
        expected = {slot: uncached(model, texts[slot] + chunk) for slot, chunk in zip(slots, chunks, strict=True)}
        before = {slot: list(texts[slot]) for slot in slots}
        if call == "truncate":
            texts[slots[0]] = texts[slots[0]][: rng.randint(0, len(texts[slots[0]]))]
            streams.truncate(slots[0], len(texts[slots[0]]))
        elif call == "copy":
            length = rng.randint(0, len(texts[slots[0]]))
            for slot in slots[1:]:
                streams.copy(slots[0], slot, length)
                texts[slot] = texts[slots[0]][:length]
        elif call == "reset":
            streams.reset(slots[:1])
            texts[slots[0]] = []
        else:
            for slot, chunk in zip(slots, chunks, strict=True):
                texts[slot] += chunk
        match call:
            case "extend":
                for slot, row in zip(slots, streams.extend(slots, chunks), strict=True):
                    assert_close(row, expected[slot][0][-1])
            case "everywhere" | "branch":
                sizes = [len(chunk) for chunk in chunks]
                found = streams.extend(slots, chunks, sizes).split(sizes)
                for slot, chunk, rows in zip(slots, chunks, found, strict=True):
                    assert_close(rows, expected[slot][0][-len(chunk) :])
                    if call == "branch":
                        texts[slot] = before[slot]
                        streams.truncate(slot, len(texts[slot]))
            case "read":
                for slot, row, states in zip(slots, *streams.read(slots, chunks, LAYERS), strict=True):
                    assert_close(row, expected[slot][0][-1])
                    assert_close(states, expected[slot][1])
            case "generate":
                streams.extend(slots, chunks)
                for _ in range(3):
                    for slot, row in zip(slots, streams.extend(slots, [[5]] * len(slots)), strict=True):
                        texts[slot].append(5)
                        assert_close(row, uncached(model, texts[slot])[0][-1])
        assert list(streams.lengths) == [len(text) for text in texts]
    assert len(made) == 8


@pytest.mark.parametrize("kind", PACKED + BATCHED)
def test_fast_kinds(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(kind)
    assert isinstance(token_streams(model, 1, 8), PackedStreams if kind in PACKED else Streams)
    assert "slow path" not in caplog.text
    assert_random_calls_equal_plain_forward_passes(model)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_kinds(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(kind)
    streams = token_streams(model, 1, 8)
    assert isinstance(streams, PlainStreams)
    assert streams.chunks
    assert "slow path (plain: by the model's own cache" in caplog.text
    # Linear attention takes a chunk by another algorithm than single tokens, with a rounding of its own.
    assert_random_calls_equal_plain_forward_passes(model, 5e-3 if kind.startswith("qwen3") else 2e-4)


def test_a_window_that_no_cache_tells_is_known_before_any_trial() -> None:
    """A batched cache is wrong for GPT-Neo, but attention so sharp does not tell on every text that is tried."""
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 512}
    layers = {"attention_types": [[["global", "local"], 1]], "window_size": 32, "initializer_range": 0.3}
    model = AutoModelForCausalLM.from_config(GPTNeoConfig(**shape, **layers)).eval()
    streams, long, short = token_streams(model, 2, 120), list(range(100)), list(range(50, 60))
    streams.extend([0, 1], [long, short])
    for row, text in zip(streams.extend([0, 1], [[5], [5]]), (long, short), strict=True):
        torch.testing.assert_close(row, uncached(model, [*text, 5])[0][-1], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", TOKEN_BY_TOKEN)
def test_kinds_read_token_by_token(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(kind)
    streams = token_streams(model, 1, 8)
    assert isinstance(streams, PlainStreams)
    assert not streams.chunks
    assert "slow path (plain, token by token" in caplog.text
    assert_random_calls_equal_plain_forward_passes(model)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_kinds(kind: str) -> None:
    with pytest.raises(UserError, match=r"cannot act: with a cache it gives other logits than without one[^\n]*$"):
        token_streams(model_of(kind), 1, 8)


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gpt-oss"])
def test_windows_are_seen(kind: str) -> None:
    """A token that has left every window no longer matters where all layers slide, and does where some do not."""
    model, tokens = model_of(kind), list(range(3, 53))
    streams = token_streams(model, 2, POSITIONS)
    one, other = streams.extend([0, 1], [tokens, [9, *tokens[1:]]])
    assert torch.equal(one, other) == (kind == "mistral")


@pytest.mark.parametrize(("kind", "limit"), [("gpt2", POSITIONS), ("dynamic-ntk", POSITIONS), ("yarn", POSITIONS)])
def test_more_tokens_than_positions_are_refused_at_the_start(kind: str, limit: int) -> None:
    model = model_of(kind)
    token_streams(model, 1, limit)
    with pytest.raises(UserError, match=rf"positions for {limit} tokens.*{limit + 1} are asked for: set agent.max_tr"):
        token_streams(model, 1, limit + 1)


def test_dynamic_ntk_beyond_its_positions_would_be_wrong() -> None:
    """Why that is refused: a later token changes what earlier ones mean, and cached keys cannot follow."""
    model = model_of("dynamic-ntk")
    tokens = [i % VOCABULARY for i in range(POSITIONS + 8)]
    streams = Streams(model, 1, len(tokens))
    streams.extend([0], [tokens[:-4]])
    late = streams.extend([0], [tokens[-4:]])[0]
    assert not torch.allclose(late, uncached(model, tokens)[0][-1], atol=1e-2)


def test_positions_and_capacity() -> None:
    assert positions_of(KINDS["bloom"]()) is None
    assert positions_of(KINDS["gpt2"]()) == POSITIONS
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32768}
    assert positions_of(Qwen3Config(max_position_embeddings=40960, rope_parameters=scaled)) == 131_072
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 4096}
    long = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    assert positions_of(Qwen3Config(max_position_embeddings=131_072, head_dim=128, rope_parameters=long)) == 4096
    assert transcript_capacity(MistralConfig(), None) == DEFAULT_TRANSCRIPT_TOKENS
    assert transcript_capacity(KINDS["gpt2"](), None) == POSITIONS
    assert transcript_capacity(KINDS["bloom"](), None) == DEFAULT_TRANSCRIPT_TOKENS
    assert transcript_capacity(MistralConfig(), 100_000) == 100_000
    with pytest.raises(UserError, match=r"97 are asked for: set agent.max_transcript_tokens to 96 or less"):
        transcript_capacity(KINDS["gpt2"](), 97)


@pytest.mark.parametrize(("kind", "copies"), [("llama", 1), ("bloom", 2)])
def test_rows_follow_from_the_free_memory(
    kind: str, copies: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(kind)
    heads, width, layers = {"llama": (2, 16, 4), "bloom": (4, 8, 2)}[kind]
    row = 100 * copies * 2 * layers * heads * width * 4  # keys and values of 100 tokens, in float32
    monkeypatch.setattr(caching, "free_memory", lambda _: 20 * row)
    assert rows_that_fit([model], 100, 16, processes=1) == 16  # 80% of 20
    assert "episodes at once" not in caplog.text
    assert rows_that_fit([model], 100, 17, processes=1) == 16
    assert "16 episodes at once instead of 17" in caplog.text
    assert rows_that_fit([model, model], 100, 64, processes=2) == 4
    assert rows_that_fit([model], 10_000, 64, processes=1) == 1


class _OffAt(Streams):
    """Whose logits are wrong on texts that begin so."""

    begins: Sequence[list[int]] = ()

    def extend(self, slots: list[int], chunks: list[list[int]], counts: list[int] | None = None) -> Tensor:
        logits = super().extend(slots, chunks, counts)
        return logits + logits.abs().max() * (self.texts[0][:3] in self.begins)


@pytest.mark.parametrize("wrong", [0, 1, TEXTS - 1, TEXTS])
def test_a_way_is_taken_if_it_is_right_on_one_text_and_left_if_it_is_wrong_on_all(
    wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 what is right may round apart on some of them."""
    model = model_of("llama")
    monkeypatch.setattr(_OffAt, "begins", [some_tokens(model, 12, text)[0, :3].tolist() for text in range(wrong)])
    tried = caching._Way(_OffAt, "tried", slow=False)
    other = caching._Way(PlainStreams, "other", slow=True)
    monkeypatch.setattr(caching, "_WAYS", (tried, other))
    assert way_of(model) is (tried if wrong < TEXTS else other)


def test_a_model_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    way = way_of(model)
    monkeypatch.setattr(caching, "_is_exact", None)
    assert way_of(model) is way
