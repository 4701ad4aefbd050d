import json
from pathlib import Path
from typing import Literal

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.extra.numpy import arrays
from optimum.quanto import QLinear, qint2, qint4, qtype, quantize_weight
from optimum.quanto.library.extensions import extension
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    GPT2Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.quantization import MseRanges, dequantize, load_rung, quantize_rung, rung_size, save_rung
from dmr_pipeline.recipe.precisions import Rung
from tests.helpers.kinds import KINDS

CPU = torch.device("cpu")
VOCABULARY, WIDTH, FEED_FORWARD, LAYERS = 40, 160, 192, 2
TOKENS = torch.arange(60).reshape(4, 15) * 7 % VOCABULARY
Weights = Literal["float", "int8", "int4", "int3", "int2"]
LADDER: list[Weights] = ["float", "int8", "int4", "int3", "int2"]


def causal_lm(tied: bool = True, config_class: type = Qwen3Config) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=40, tie_word_embeddings=tied, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def rung(weights: Weights, **settings: object) -> Rung:
    return Rung.model_validate({"name": "rung", "weights": weights, **settings})


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens).logits


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever quanto would compile or load, in any test here, is an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("quanto's C++ extension was asked for")

    monkeypatch.setattr(extension, "load", refuse)
    monkeypatch.setattr(extension.get_extension("quanto_cpp"), "_lib", None)


@pytest.mark.parametrize("keep_float", [["lm_head"], []], ids=["head-float", "head-quantized"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("weights", LADDER)
def test_a_reloaded_rung_is_bit_identical(tmp_path: Path, weights: Weights, tied: bool, keep_float: list[str]) -> None:
    model = causal_lm(tied)
    before = logits(model)
    quantized = quantize_rung(model, rung(weights, keep_float=keep_float))
    assert_same(logits(model), before)
    assert torch.equal(logits(quantized), before) == (weights == "float")

    save_rung(quantized, tmp_path / "one")
    random_state = torch.get_rng_state()
    loaded = load_rung(tmp_path / "one", CPU)
    assert torch.equal(torch.get_rng_state(), random_state), "loading must leave the caller's random numbers alone"
    state, expected = loaded.state_dict(), quantized.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(state[name], tensor)
    for buffer, other in zip(loaded.buffers(), quantized.buffers(), strict=True):
        assert_same(buffer, other)  # the rotary frequencies, which are in no file
    assert_same(logits(loaded), logits(quantized))
    assert rung_size(loaded) == rung_size(quantized)

    save_rung(loaded, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["config.json", "model.safetensors", "quantization_map.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "int8"},
        {"weights": "int4", "head": "int8"},
        {"weights": "int3", "ranges": "mse"},
        {"weights": "int2"},
    ],
    ids=lambda settings: settings["weights"],
)
def test_in_bfloat16_too(tmp_path: Path, settings: dict[str, str]) -> None:
    """Wide enough for groups of 128, which quanto would give to torch's int4 kernel, and rounded."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=384, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=40,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    quantized = quantize_rung(model, Rung.model_validate({"name": "rung", **settings}))
    save_rung(quantized, tmp_path)
    loaded = load_rung(tmp_path, CPU)
    assert loaded.dtype == torch.bfloat16
    expected, state = quantized.state_dict(), loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert_same(logits(loaded), logits(quantized))
    assert_same(logits(dequantize(loaded)), logits(quantized))


@pytest.mark.parametrize("weights", ["int8", "int4", "int3", "int2"])
@pytest.mark.parametrize("config_class", [Qwen3Config, Qwen2Config], ids=["qwen3", "qwen2-with-biases"])
def test_dequantized_it_computes_the_same(weights: Weights, config_class: type) -> None:
    model = quantize_rung(causal_lm(config_class=config_class), rung(weights))
    assert any(isinstance(module, QLinear) for module in model.modules())
    expected = [logits(model, tokens) for tokens in (TOKENS, TOKENS[:1, :1])]
    plain = dequantize(model)
    assert not any(isinstance(module, QLinear) for module in plain.modules())
    for tokens, before in zip((TOKENS, TOKENS[:1, :1]), expected, strict=True):
        assert_same(logits(plain, tokens), before)


def test_divergence_from_float_grows_as_bits_fall() -> None:
    model = causal_lm()
    expected = logits(model).log_softmax(-1)
    divergences = [
        torch.nn.functional.kl_div(
            logits(quantize_rung(model, rung(weights))).log_softmax(-1),
            expected,
            log_target=True,
            reduction="batchmean",
        )
        for weights in LADDER
    ]
    assert divergences[0] == 0
    assert divergences == sorted(divergences)
    assert len(set(divergences)) == len(LADDER)


def test_int2_weights_are_the_nearest_of_four_levels_of_each_group() -> None:
    """quanto's packing, our unpacking and the group size, against plain arithmetic."""
    model = causal_lm()
    weight = model.model.layers[0].mlp.down_proj.weight.detach().numpy()  # [160, 192]: groups of 96
    groups = weight.reshape(-1, 96)
    low, high = np.minimum(groups.min(1, keepdims=True), 0), np.maximum(groups.max(1, keepdims=True), 0)
    step = (high - low) / 3
    expected = (np.clip(np.round((groups - low) / step), 0, 3) * step + low).reshape(weight.shape)
    plain = dequantize(quantize_rung(model, rung("int2")))
    np.testing.assert_allclose(plain.model.layers[0].mlp.down_proj.weight.numpy(), expected, rtol=0, atol=1e-6)


def shrunk(group: np.ndarray, share: float, bits: int) -> np.ndarray:
    """What is left of a group's weights if its integers span this share of its range; plain arithmetic."""
    if np.ptp(group) == 0:
        return group
    step = share * np.ptp(group) / (2**bits - 1)
    lowest = group.mean() + share * (group.min() - group.mean())
    return np.clip(np.round((group - lowest) / step), 0, 2**bits - 1) * step + lowest


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the one here only forbids
@given(
    weights=arrays(np.float32, (3, 64), elements=st.floats(-2, 2, width=16)),
    integers=st.sampled_from([qint2, qint4]),
)
def test_mse_ranges_have_the_least_error_of_all_shares(weights: np.ndarray, integers: qtype) -> None:
    weights[0] = weights[0, 0]  # a group without a range
    tensor, groups = torch.from_numpy(weights), weights.reshape(-1, 32)
    scale, shift = MseRanges()(tensor, integers, 0, group_size=32)
    stored = quantize_weight(tensor, integers, 0, scale, shift, group_size=32).dequantize()
    errors = np.square(stored.numpy().reshape(-1, 32) - groups).sum(1)
    for group, error in zip(groups.astype(np.float64), errors, strict=True):
        least = min(np.square(shrunk(group, share, integers.bits) - group).sum() for share in np.linspace(0.3, 1, 29))
        assert error == pytest.approx(least, rel=1e-3, abs=1e-5)


def test_a_rung_with_mse_ranges_is_nearer_to_float_and_as_small(tmp_path: Path) -> None:
    model = causal_lm()
    plain, shrunk_one = (quantize_rung(model, rung("int2", ranges=ranges)) for ranges in (None, "mse"))
    assert rung_size(shrunk_one) == rung_size(plain)
    weights = model.model.layers[0].mlp.down_proj.weight
    distances = [
        torch.dist(dequantize(quantized).model.layers[0].mlp.down_proj.weight, weights)
        for quantized in (plain, shrunk_one)
    ]
    assert distances[1] < 0.9 * distances[0]
    save_rung(shrunk_one, tmp_path)
    assert_same(logits(load_rung(tmp_path, CPU)), logits(shrunk_one))
    for refused in ("float", "int8"):
        with pytest.raises(ValidationError, match="ranges is for int4, int3 and int2 weights"):
            rung(refused, ranges="mse")


@pytest.mark.parametrize(
    ("width", "group"), [(64, None), (128, None), (160, 32), (192, 96), (256, 128), (320, 64), (200, None)]
)
def test_group_size_of_a_width(width: int, group: int | None) -> None:
    for integers in (qint2, qint4):
        assert QLinear(width, 8, weights=integers).weight_group_size == group


def test_sizes_are_those_of_the_packed_weights(tmp_path: Path) -> None:
    """Closed form: packed integers, and a scale (and shift, below 8 bits) for each group; a float counts 16 bits."""
    model = causal_lm()
    # (outputs, inputs, groups in a row) of q, k, v, o, gate, up, down: 160 inputs in groups of 32, 192 in groups of 96
    linears = [(160, 160, 5), (80, 160, 5), (80, 160, 5), (160, 160, 5), (192, 160, 5), (192, 160, 5), (160, 192, 2)]
    quantized = LAYERS * sum(rows * columns for rows, columns, _ in linears)
    norms = LAYERS * (2 * WIDTH + 2 * 40) + WIDTH
    kept = VOCABULARY * WIDTH + norms  # the head is tied: once
    rows = LAYERS * sum(rows for rows, _, _ in linears)
    groups = LAYERS * sum(rows * groups for rows, _, groups in linears)
    expected = {
        "float": 2 * (quantized + kept),
        "int8": quantized + 2 * rows + 2 * kept,
        "int4": quantized // 2 + 4 * groups + 2 * kept,
        "int3": quantized * 3 // 8 + 4 * groups + 2 * kept,
        "int2": quantized // 4 + 4 * groups + 2 * kept,
    }
    for weights in LADDER:
        model_at_rung = quantize_rung(model, rung(weights))
        size = rung_size(model_at_rung)
        assert size.bytes == expected[weights]
        assert size.bits_per_weight == pytest.approx(8 * expected[weights] / (quantized + kept))
        save_rung(model_at_rung, tmp_path / weights)
        stored = load_file(tmp_path / weights / "model.safetensors")
        halved = [
            t.nbytes // (2 if t.dtype == torch.float32 else 1) for n, t in stored.items() if not n.endswith("put_scale")
        ]
        assert sum(halved) == size.bytes


def test_the_head_stays_float_by_default_and_patterns_must_fit() -> None:
    model = quantize_rung(causal_lm(), rung("int4"))
    assert not isinstance(model.lm_head, QLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = quantize_rung(causal_lm(), rung("int4", keep_float=["*.down_proj"]))
    assert isinstance(model.lm_head, QLinear)
    assert not isinstance(model.model.layers[1].mlp.down_proj, QLinear)
    with pytest.raises(UserError, match=r"'lm_haed' fits no module .* called .*down_proj, .*up_proj"):
        quantize_rung(causal_lm(), rung("int4", keep_float=["lm_haed"]))


def test_quantized_activations(tmp_path: Path) -> None:
    model = causal_lm()
    calls: list[PreTrainedModel] = []

    def calibration(quantized: PreTrainedModel) -> None:
        calls.append(quantized)
        logits(quantized)

    quantized = quantize_rung(model, rung("int2", activations="int8"), calibration)
    assert calls == [quantized]
    assert not torch.equal(logits(quantized), logits(quantize_rung(model, rung("int2"))))
    # inputs only, with the scale that calibration has seen: the first layer's is its normalised embedding
    with torch.no_grad():
        first = model.model.layers[0].input_layernorm(model.model.embed_tokens(TOKENS))
    projection = quantized.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(projection.input_scale, first.abs().max() / 127)
    rounded = (first / projection.input_scale).round() * projection.input_scale
    with torch.no_grad():
        torch.testing.assert_close(projection(first), rounded @ projection.weight.dequantize().T, rtol=1e-4, atol=1e-4)

    save_rung(quantized, tmp_path)
    loaded = load_rung(tmp_path, CPU)
    assert_same(logits(loaded), logits(quantized))
    assert dequantize(loaded) is loaded
    layers = json.loads((tmp_path / "quantization_map.json").read_text())
    assert len(layers) == 7 * LAYERS
    assert rung_size(loaded).bytes == rung_size(quantize_rung(model, rung("int2"))).bytes + 2 * 2 * len(layers)
    for impossible in (rung("float", activations="int8"), rung("int8", activations="int8")):
        with pytest.raises(UserError, match="calibration"):
            quantize_rung(model, impossible)


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rung"):
        load_rung(tmp_path / "nowhere", CPU)
    save_rung(quantize_rung(causal_lm(), rung("int4")), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_rung(tmp_path, CPU)
    weights.write_bytes(whole)
    layers = json.loads((tmp_path / "quantization_map.json").read_text())
    (tmp_path / "quantization_map.json").write_text(json.dumps(dict(list(layers.items())[1:])))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_rung(tmp_path, CPU)
    weights.unlink()
    torch.save(causal_lm().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        load_rung(tmp_path, CPU)


GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MIXTURES: list[PretrainedConfig] = [
    Qwen3MoeConfig(**SMALL, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    MixtralConfig(**SMALL, num_local_experts=4),
    GptOssConfig(**SMALL, num_local_experts=4),
]


def of(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("weights", ["int8", "int4", "int3", "int2"])
def test_gpt2s_layers_are_quantized_as_linear_ones(tmp_path: Path, weights: Weights) -> None:
    model = of(GPT2)
    before = logits(model)
    quantized = quantize_rung(model, rung(weights))
    assert_same(logits(model), before)
    assert rung_size(quantized).quantized_share > 0.9
    layer = quantized.transformer.h[0].mlp.c_fc
    assert isinstance(layer, QLinear)
    original = model.transformer.h[0].mlp.c_fc.weight.detach().T  # Conv1D has it the other way round
    step = 2 * float(original.abs().max()) / (2 ** int(weights[3:]) - 1)
    assert float((layer.weight.dequantize().detach() - original).abs().max()) <= step
    save_rung(quantized, tmp_path)
    assert_same(logits(load_rung(tmp_path, CPU)), logits(quantized))
    expected = logits(quantized)
    assert_same(logits(dequantize(quantized)), expected)


@pytest.mark.parametrize("config", MIXTURES, ids=lambda config: config.model_type)
def test_a_rung_that_would_leave_experts_in_float_is_refused(config: PretrainedConfig) -> None:
    with pytest.raises(
        UserError, match=r"'rung' would leave \d\d% of the weights in float .*: \w+Experts \(model\.layers"
    ):
        quantize_rung(of(config), rung("int2"))
    knowingly = quantize_rung(of(config), rung("int2", keep_float=["lm_head", "*.experts"]))
    assert 0 < rung_size(knowingly).quantized_share < 0.6


def test_the_matrices_that_are_most_of_what_is_left_in_float_are_named() -> None:
    with pytest.raises(UserError, match=r"it is to quantize: \w*Experts \(model\.layers"):
        quantize_rung(of(KINDS["qwen3-next"]()), rung("int4"))


@pytest.mark.parametrize("head", ["int8", "int4"])
def test_a_head_with_a_bias_that_is_tied_is_read_as_it_was_written(tmp_path: Path, head: str) -> None:
    model = of(KINDS["bert-decoder"]())
    nn.init.normal_(model.cls.predictions.bias)
    quantized = quantize_rung(model, rung("int8" if head == "int8" else "int4", head=head))
    save_rung(quantized, tmp_path)
    assert_same(logits(load_rung(tmp_path, CPU)), logits(quantized))
    assert float(quantized.cls.predictions.decoder.bias.abs().max()) > 0


def test_lm_head_is_the_head_whatever_the_model_calls_it(tmp_path: Path) -> None:
    config = BioGptConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    quantized = quantize_rung(of(config), rung("int4"))
    assert not isinstance(quantized.output_projection, QLinear)
    assert isinstance(quantized.biogpt.layers[0].fc1, QLinear)
    assert isinstance(quantize_rung(of(config), rung("int4", keep_float=[])).output_projection, QLinear)
    save_rung(quantized, tmp_path)
    assert_same(logits(load_rung(tmp_path, CPU)), logits(quantized))


def test_the_share_is_that_of_all_weights() -> None:
    model = causal_lm()
    assert rung_size(quantize_rung(model, rung("float"))).quantized_share == 0
    linear = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    assert rung_size(quantize_rung(model, rung("int8"))).quantized_share == linear / model.num_parameters()


def test_a_rung_knows_all_tokens_that_end_the_models_texts(tmp_path: Path) -> None:
    model = causal_lm()
    model.config.eos_token_id = 3
    model.generation_config.eos_token_id = [3, 7]
    save_rung(quantize_rung(model, rung("float")), tmp_path / "rung")
    assert load_rung(tmp_path / "rung", CPU).generation_config.eos_token_id == [3, 7]
