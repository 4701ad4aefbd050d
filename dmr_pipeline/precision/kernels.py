"""Products with low-bit weights by torch's kernels, for acting: a pass over few tokens is as quick as its weights are read.

torch has two such kernels for bfloat16 rows: int8 with a scale an output (on a CPU; that for CUDA is slower than bfloat16), and
int4 with a scale and a zero for each 32, 64 or 128 inputs. The others of a rung go through the latter: int3 and int2 as int4,
whose bytes are then read, and quanto's groups of other sizes, such as 96, in parts that share their scale. A layer that no
kernel fits is dequantized.

At many rows computing counts, not reading, and a plain product is quicker: each layer keeps its weights dequantized too. That
takes 21 to 24 bits a weight in place of 16, and the memory of neither is saved: what is saved is time. On one core of a server's
CPU (AVX512-BF16), for the layers of a model of 135 M, int4 took 0.25 of bfloat16's time at 1 row, 0.41 at 4, 0.70 at 8 and 1.07
at 16, int8 0.52, 0.70, 0.99 and 1.35; on an H100 int4 0.37 to 0.63 at 1 row and 0.68 to 1.08 at 8.
"""

from typing import NamedTuple

import torch
from optimum.quanto import QLinear, WeightQBitsTensor, WeightQBytesTensor, qint8
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from dmr_pipeline.precision.packing import levels_of
from dmr_pipeline.precision.quantization import dequantize

_MOST_ROWS_OF_INT8 = 6
_MOST_ROWS_OF_INT4 = {"cpu": 12, "cuda": 8}
"""By the device; at more rows the kernels are slower than bfloat16."""
_GROUPS = (128, 64, 32)
"""Inputs that may share a scale in torch's int4 kernels, the fewest bytes first."""
_MIDDLE = 8
"""The code that these kernels take for zero."""
_ALIGNMENT = 64
"""Bytes. torch's int8 kernel for CPUs kills the process where weights or rows lie at an address that is no multiple of 16."""


class Int8Weights(NamedTuple):
    integers: Tensor
    """int8 [outputs, inputs]."""
    scale: Tensor
    """bfloat16 [outputs]."""


class Int4Weights(NamedTuple):
    """Weights (code - 8) * scale + zero."""

    packed: Tensor
    """Codes of 4 bits, as the device's kernel has them."""
    group: int
    """Inputs that share a scale and a zero."""
    scales_and_zeros: Tensor
    """bfloat16 [groups of an output, outputs, 2]."""


class LowBitLinear(nn.Module):
    """A linear layer of bfloat16 rows, by a kernel where they are few.

    For rows x, exact weights w (scale * integer - shift of the quantized layer) and zeros z of their groups, an output is
    within 2**-8 * |x| @ (|w| + |z|) of x @ w; of int8 there are no zeros.
    """

    def __init__(self, layer: QLinear, weights: Int8Weights | Int4Weights, most_rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
        self.bias = layer.bias
        self.low_bits, self.most_rows = weights, most_rows

    def forward(self, rows: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if rows.numel() > self.most_rows * self.in_features:
            return linear(rows, self.weight, self.bias)
        product = self._product(rows.reshape(-1, self.in_features)).view(*rows.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def _product(self, rows: Tensor) -> Tensor:
        weights = self.low_bits
        if isinstance(weights, Int8Weights):
            return torch._weight_int8pack_mm(_aligned(rows), weights.integers, weights.scale)
        multiply = torch._weight_int4pack_mm_for_cpu if rows.device.type == "cpu" else torch._weight_int4pack_mm
        return multiply(rows.contiguous(), weights.packed, weights.group, weights.scales_and_zeros)

    @property
    def pass_bytes(self) -> int:
        """That a pass over few tokens reads of the weights."""
        return sum(part.nbytes for part in self.low_bits if isinstance(part, Tensor))


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def with_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """Have torch's kernels compute the quantized layers that they fit; the others become plain float ones. In place.

    Args:
        model: a rung in bfloat16, as `load_rung` returns it. One with quantized activations stays as it is.
    """
    for name in [name for name, module in model.named_modules() if isinstance(module, QLinear)]:
        layer = model.get_submodule(name)
        if layer.activation_qtype is None and (fitted := _fitted(layer)) is not None:
            model.set_submodule(name, fitted)
    return dequantize(model)


def _fitted(layer: QLinear) -> LowBitLinear | None:
    """The layer by a kernel, None where there is none for it."""
    weight, device = layer.weight, layer.weight.device.type
    if weight.dtype != torch.bfloat16:
        return None
    if isinstance(weight, WeightQBytesTensor):
        fits = device == "cpu" and weight.qtype == qint8 and layer.in_features % _GROUPS[-1] == 0
        return LowBitLinear(layer, int8_weights(weight), _MOST_ROWS_OF_INT8) if fits else None
    weights = int4_weights(weight)
    return None if weights is None else LowBitLinear(layer, weights, _MOST_ROWS_OF_INT4[device])


def int8_weights(weight: WeightQBytesTensor) -> Int8Weights:
    return Int8Weights(_aligned(weight._data), weight._scale.flatten())


def int4_weights(weight: WeightQBitsTensor) -> Int4Weights | None:
    """Integers of 4, 3 or 2 bits as codes about the middle one, where zeros are small, so that rounding them costs little; None
    where torch's kernel has no such groups or numbers of inputs and outputs."""
    outputs, inputs = weight.shape
    levels, bits = levels_of(weight), weight.qtype.bits
    of_levels = levels.integers.shape[1]
    group = next((size for size in _GROUPS if of_levels % size == 0), None)
    if group is None or outputs % 16:
        return None
    middle = 2 ** (bits - 1)
    codes = levels.integers.view(outputs, inputs).int() + (_MIDDLE - middle)
    zeros = middle * levels.scale.float() - levels.shift.float()
    both = torch.stack((levels.scale.float(), zeros), dim=-1).view(outputs, -1, 2)
    both = both.repeat_interleave(of_levels // group, dim=1).transpose(0, 1).bfloat16().contiguous()
    if weight.device.type == "cpu":
        return Int4Weights(torch._convert_weight_to_int4pack_for_cpu(codes, 2), group, both)
    tiles = max(tiles for tiles in (2, 4, 8) if inputs % (16 * tiles) == 0)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    return Int4Weights(torch._convert_weight_to_int4pack(pairs, tiles), group, both)
