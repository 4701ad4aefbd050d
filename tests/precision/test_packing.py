"""Integers of 3 bits, and heads of fewer bits, against plain arithmetic."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from optimum.quanto import MaxOptimizer, QLinear, qint2, qint4
from optimum.quanto.tensor.packed import PackedTensor
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    Gemma3TextConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from dmr_pipeline.agent.logits import decoder_of, logits_of
from dmr_pipeline.precision.packing import group_size, qint3, round_to_nearest
from dmr_pipeline.precision.quantization import dequantize, load_rung, quantize_rung, rung_size, save_rung
from dmr_pipeline.recipe.precisions import Rung

CPU = torch.device("cpu")
VOCABULARY = 40
TOKENS = torch.arange(60).reshape(4, 15) * 7 % VOCABULARY
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
TIED: list[PretrainedConfig] = [
    Qwen3Config(**SMALL),
    Gemma3TextConfig(**SMALL),
    GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    BioGptConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4
    ),
]


def causal_lm(config: PretrainedConfig = TIED[0]) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits


@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=2, max_side=20), elements=st.integers(0, 7)))
def test_three_bits_are_unpacked_as_they_were_packed(integers: np.ndarray) -> None:
    packed = PackedTensor.pack(torch.from_numpy(integers), bits=3)
    np.testing.assert_array_equal(packed.numpy(), integers)
    rows = -(-len(integers) // 8) * 8
    assert packed._data.numel() == rows * integers[0].size * 3 // 8, "3 bits a weight, rows filled up to 8"


def test_bit_planes_by_hand() -> None:
    """Column 0..7: the planes' bits are, lowest plane first, 01010101, 00110011, 00001111, the first integer's lowest."""
    packed = PackedTensor.pack(torch.arange(8, dtype=torch.uint8), bits=3)
    assert packed._data.tolist() == [0b10101010, 0b11001100, 0b11110000]


@given(st.integers(1, 20), st.sampled_from([1, 8, 31, 160, 192, 200]), st.integers(0, 99))
def test_int3_is_the_nearest_of_eight_levels_of_each_group(outputs: int, inputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs))
    weight = model[0].weight.detach().numpy().copy()
    groups = weight.reshape(-1, group_size(inputs) or inputs)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = np.where(high > low, (high - low) / 7, 1)
    expected = (np.round((groups - low) / step) * step + low).reshape(weight.shape)
    levels = round_to_nearest(model[0].weight.detach(), qint3, MaxOptimizer())
    for stored in (levels.packed(weight.shape, qint3).dequantize(), levels.weights(weight.shape)):
        np.testing.assert_allclose(stored.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [31, 64, 128, 160, 192, 200, 256, 320, 576])
def test_groups_of_int3_are_those_of_int4(width: int) -> None:
    assert {QLinear(width, 8, weights=integers).weight_group_size for integers in (qint2, qint4)} == {group_size(width)}


def test_int3_with_widths_that_8_does_not_divide(tmp_path: Path) -> None:
    """44 inputs of down_proj, and 36 outputs of a head of its own: rows are filled up to 40."""
    config = Qwen3Config(**SMALL | {"tie_word_embeddings": False, "vocab_size": 36})
    model = quantize_rung(causal_lm(config), Rung(name="int3", weights="int3", ranges="mse", keep_float=()))
    save_rung(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["lm_head.weight._data._data"].shape == (3 * 5, 64)
    assert stored["model.layers.0.mlp.down_proj.weight._data._data"].shape == (3 * 8, 44)
    loaded = load_rung(tmp_path, CPU)
    tokens = TOKENS % 36
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    counted = {name: tensor for name, tensor in stored.items() if not name.endswith("put_scale")}
    assert rung_size(loaded).bytes == sum(t.nbytes // (2 if t.is_floating_point() else 1) for t in counted.values())


def eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """Weights [outputs, inputs] rounded to nearest, symmetric, with a scale an output."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127  # the padding token's row may be 0
    return (weight / scale).round() * scale


def of_groups(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Weights [outputs, inputs] rounded to nearest, between the least and the greatest of each row (64 inputs are one group)."""
    least, greatest = weight.aminmax(dim=1, keepdim=True)
    scale = (greatest - least).clamp(min=1e-9) / (2**bits - 1)
    return ((weight - least) / scale).round() * scale + least


@pytest.mark.parametrize(("weights", "head_bits"), [("int8", 8), ("int3", 8), ("int4", 4), ("int3", 3)])
@pytest.mark.parametrize("config", TIED, ids=lambda config: config.model_type)
def test_a_tied_head_of_few_bits_is_untied(
    tmp_path: Path, config: PretrainedConfig, weights: str, head_bits: int
) -> None:
    model = causal_lm(config)
    before = model.get_input_embeddings().weight.detach().clone()
    rung = Rung.model_validate(
        {"name": "rung", "weights": weights, "head": f"int{head_bits}", "keep_float": ["lm_head"]}
    )
    quantized = quantize_rung(model, rung)
    assert model.config.tie_word_embeddings, "the float model stays as it is"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head, embedding = quantized.get_output_embeddings(), quantized.get_input_embeddings().weight
    assert torch.equal(embedding, before)
    exact = eight_bits(before) if head_bits == 8 else of_groups(before, head_bits)
    torch.testing.assert_close(head.weight.dequantize().detach(), exact, rtol=0, atol=1e-7)

    plain = quantize_rung(model, Rung.model_validate({"name": "rung", "weights": weights}))
    rows, columns = before.shape
    scales = 1 if head_bits == 8 else 2  # and shifts
    assert rung_size(quantized).bytes == rung_size(plain).bytes + rows * columns * head_bits // 8 + 2 * rows * scales
    assert rung_size(quantized).quantized_share > rung_size(plain).quantized_share

    save_rung(quantized, tmp_path)
    loaded = load_rung(tmp_path, CPU)
    assert not loaded.config.tie_word_embeddings
    expected = logits(quantized)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(loaded.get_input_embeddings().weight, before)
    acting = dequantize(loaded)
    assert torch.equal(logits(acting), expected)
    assert torch.equal(acting.get_input_embeddings().weight, before), "dequantizing ties nothing again"
    with torch.no_grad():
        hidden = decoder_of(acting)(input_ids=TOKENS).last_hidden_state
        torch.testing.assert_close(logits_of(acting, hidden[0]), expected[0], rtol=1e-5, atol=1e-5)
        everything = torch.ones_like(TOKENS[:1])  # else what looks like padding is left out
        again = acting.generate(TOKENS[:1], attention_mask=everything, max_new_tokens=3, do_sample=False)
    assert again[0, 15] == expected[0, -1].argmax()


def test_a_head_of_int8_is_for_quantized_rungs() -> None:
    with pytest.raises(ValidationError, match="rung 'rung' is float throughout: leave out head"):
        Rung(name="rung", weights="float", head="int8")
    assert Rung(name="rung", weights="int4").model_dump().keys() & {"head", "rounding"} == set()
