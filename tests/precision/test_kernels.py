"""Low-bit kernels against the products of the weights that they stand for."""

from pathlib import Path
from typing import Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from optimum.quanto import MaxOptimizer, QLinear, WeightQBitsTensor, qtypes
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config

from dmr_pipeline.agent.checkpoint import random_causal_lm
from dmr_pipeline.precision.acting import acting_model
from dmr_pipeline.precision.kernels import LowBitLinear, with_kernels
from dmr_pipeline.precision.packing import round_to_nearest
from dmr_pipeline.precision.quantization import MseRanges, load_rung, quantize_rung, save_rung
from dmr_pipeline.recipe.precisions import Rung
from dmr_pipeline.rollout.kv_cache.choice import token_streams
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams

CPU = torch.device("cpu")
KINDS = ("int8", "int4", "int3", "int2")
Kind = Literal["int8", "int4", "int3", "int2"]


def quantized_layer(kind: Kind, inputs: int, outputs: int, mse: bool = False, bias: bool = False) -> QLinear:
    plain = nn.Linear(inputs, outputs, bias, dtype=torch.bfloat16)
    plain.weight.data += 0.3 * plain.weight.abs().max() * torch.randn(outputs, 1)  # groups that are not about zero
    layer = QLinear.from_module(plain, weights=qtypes[f"q{kind}"])
    if kind == "int8":
        layer.freeze()
    else:
        levels = round_to_nearest(plain.weight.detach(), qtypes[f"q{kind}"], MseRanges() if mse else MaxOptimizer())
        layer.weight = nn.Parameter(levels.packed(plain.weight.shape, qtypes[f"q{kind}"]))
    return layer


def by_kernel(layer: nn.Module) -> nn.Module:
    return with_kernels(nn.ModuleDict({"layer": layer}))["layer"]


def exact(weight: Tensor, middle: bool = False) -> Tensor:
    """float32 weights, or where a group's zero is, as quanto computes them in float32."""
    if not isinstance(weight, WeightQBitsTensor):
        return torch.zeros(weight.shape) if middle else weight._scale.float() * weight._data.float()
    integers = weight._data.unpack()
    if middle:
        integers = torch.full_like(integers, 2 ** (weight.qtype.bits - 1))
    parts = (weight._group_size, weight.shape, weight.stride(), integers, weight._scale.float(), weight._shift.float())
    return WeightQBitsTensor.create(weight.qtype, 0, *parts).dequantize()


@given(
    st.sampled_from(KINDS),
    st.sampled_from([32, 64, 96, 128, 160, 192, 256, 576]),
    st.sampled_from([16, 48, 64, 80, 192]),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_products_are_within_the_bound(kind: Kind, inputs: int, outputs: int, count: int, mse: bool, seed: int) -> None:
    torch.manual_seed(seed)
    quantized = quantized_layer(kind, inputs, outputs, mse)
    weights, zeros = exact(quantized.weight), exact(quantized.weight, middle=True)
    layer = by_kernel(quantized)
    assert isinstance(layer, LowBitLinear)
    layer.most_rows = 12
    layer.weight.data.zero_()  # that of many rows is not used
    rows = torch.randn(count, inputs).bfloat16()
    error = (layer(rows).float() - rows.float() @ weights.T).abs()
    assert (error <= 2**-8 * (rows.float().abs() @ (weights.abs() + zeros.abs()).T)).all()
    assert torch.equal(layer(rows[None, None]), layer(rows)[None, None]), "whatever the shape"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_many_rows_are_multiplied_with_the_dequantized_weights(kind: Kind) -> None:
    torch.manual_seed(0)
    quantized = quantized_layer(kind, 96, 32, bias=True)
    dequantized, bias = quantized.weight.dequantize(), quantized.bias.clone()
    layer = by_kernel(quantized)
    rows = torch.randn(layer.most_rows + 1, 96).bfloat16()
    many = layer(rows)
    assert torch.equal(many, nn.functional.linear(rows, dequantized, bias))
    few = layer(rows[:-1])
    assert not torch.equal(few, many[:-1])
    torch.testing.assert_close(few, many[:-1], rtol=0.05, atol=0.05)
    assert layer.pass_bytes < 0.6 * dequantized.nbytes


@torch.no_grad()
def test_what_no_kernel_fits_is_dequantized() -> None:
    for layer in (
        quantized_layer("int4", 64, 40),  # outputs in no sixteens
        quantized_layer("int4", 80, 32),  # groups in no 32s
        quantized_layer("int8", 40, 32),
    ):
        expected = layer.weight.dequantize()
        plain = by_kernel(layer)
        assert type(plain) is nn.Linear
        assert torch.equal(plain.weight, expected)


def llama(dtype: torch.dtype, config_class: type = LlamaConfig) -> PreTrainedModel:
    config = config_class(
        vocab_size=64, hidden_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=128, head_dim=32, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    return random_causal_lm(config, CPU).to(dtype)


def layers_by_kernel(model: PreTrainedModel) -> int:
    return sum(isinstance(module, LowBitLinear) for module in model.modules())


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config], ids=["llama", "qwen2-with-biases"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_rung_from_a_file_acts_by_kernels_near_its_dequantized_weights(
    tmp_path: Path, kind: Kind, config_class: type
) -> None:
    """In a file the integers lie unaligned, where torch's int8 kernel dies."""
    rung = Rung(name="rung", weights=kind, head="int8" if kind == "int2" else kind)
    save_rung(quantize_rung(llama(torch.bfloat16, config_class), rung), tmp_path)
    plain = acting_model(load_rung(tmp_path, CPU), CPU)
    model = acting_model(load_rung(tmp_path, CPU), CPU, "low_bit")
    assert layers_by_kernel(plain) == 0
    assert layers_by_kernel(model) == 2 * 7 + 1
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    streams = token_streams(model, 2, 64)
    assert isinstance(streams, PackedStreams)
    streams.extend([0, 1], [tokens[:9], tokens[:4]])
    found = streams.extend([0, 1], [tokens[9:10], tokens[4:]])  # 12 rows, some by kernel
    for row, count in zip(found, (10, 15), strict=True):
        expected = plain(torch.tensor([tokens[:count]])).logits[0, -1].float()
        assert (row - expected).norm() <= 0.05 * expected.norm()


def test_other_dtypes_and_quantized_activations_act_as_without_kernels() -> None:
    rung = Rung(name="rung", weights="int4")
    assert layers_by_kernel(acting_model(quantize_rung(llama(torch.float32), rung), CPU, "low_bit")) == 0
    rounded = Rung(name="rung", weights="int8", activations="int8")
    model = quantize_rung(llama(torch.bfloat16), rounded, lambda model: model(torch.arange(8)[None]))
    assert layers_by_kernel(acting_model(model, CPU, "low_bit")) == 0
