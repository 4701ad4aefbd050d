"""Integers of 2, 3 and 4 bits as quanto's tensors hold them, in memory and in files.

quanto packs 2 and 4 bits, and unpacks them by a C++ extension, which it compiles on first use into its own installed folder
(killed half-way, it leaves a lock on which every later load waits). A few operations of torch replace it here: the same bytes,
and nothing is ever compiled.

3 bits are ours. They lie in three bit planes, in each of which a byte has one bit of 8 integers of a column, so that a weight
takes 3 bits in memory and in files; rows are filled up to a multiple of 8. quanto's tensors, layers and files know the type by
its name `qint3`, once this module is imported.
"""

import warnings
from typing import NamedTuple, cast

import torch
from optimum.quanto import AffineOptimizer, QLinear, WeightQBitsTensor, qint4, qtype, qtypes
from optimum.quanto.library.qbytes_mm import qbytes_int_mm, qbytes_mm
from optimum.quanto.tensor.packed import PackedTensor
from torch import Tensor

qint3 = qtype("qint3", is_floating_point=False, bits=3, dtype=torch.int8, qmin=-4, qmax=3)
qtypes[qint3.name] = qint3


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """What `PackedTensor.pack` packed, and where rows were filled up, these too: integers [rows, ...] (uint8).

    Of 2 and 4 bits a byte holds 8 / bits integers, lowest bits first, stacked along the first axis. Of 3 bits the first axis is
    that of the planes, one third of it each, lowest bits first, and bytes hold one bit of 8 integers in the same order.
    """
    if bits == 3:
        planes = [_unpack(plane, 1) for plane in packed.chunk(3)]
        return planes[0] | planes[1] << 1 | planes[2] << 2
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def _pack(integers: Tensor, bits: int = 4) -> PackedTensor:
    """uint8 integers [rows, ...] of 2, 3 or 4 bits -> packed ones."""
    if bits != 3:
        return cast("PackedTensor", _quantos_pack(integers, bits))
    filled = integers.new_zeros(-(-len(integers) // 8) * 8, *integers.shape[1:])
    filled[: len(integers)] = integers
    planes = [_byte_of(((filled >> bit) & 1).chunk(8)) for bit in range(3)]
    return PackedTensor(torch.cat(planes), 3, integers.size(), integers.stride())


def _byte_of(bits: tuple[Tensor, ...]) -> Tensor:
    byte = torch.zeros_like(bits[0])
    for place, bit in enumerate(bits):
        byte |= bit << place
    return byte


def _bytes_product(rows: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    """Rows [n, inputs], int8 or float, times weights: integers [outputs, inputs] that have scales [outputs, 1]. On a CPU quanto
    takes torch's kernel for bfloat16, which kills the process where the integers lie as they do in a file, unaligned."""
    if rows.dtype == torch.int8:
        return qbytes_int_mm(rows, integers, scales)
    return qbytes_mm(rows, integers, scales)


def _create(
    kind: qtype,
    axis: int,
    group_size: int | None,
    size: torch.Size,
    stride: tuple[int, ...],
    data: Tensor,
    scale: Tensor,
    shift: Tensor,
    requires_grad: bool = False,
) -> WeightQBitsTensor:
    """quanto's tensor. On a CPU it is never one of quanto's own for torch's int4 kernel, which round the shifts of bfloat16."""
    make = WeightQBitsTensor if data.device.type == "cpu" else _quantos_create
    return make(kind, axis, group_size, size, stride, data, scale, shift, requires_grad)


_quantos_create = WeightQBitsTensor.create
WeightQBitsTensor.create = staticmethod(_create)
_quantos_pack = PackedTensor.pack
PackedTensor.pack = staticmethod(_pack)  # quanto's own knows 2 and 4 bits
_kernels = torch.library.Library("quanto", "IMPL")  # the replacement lasts as long as this object
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*may also be overridden", category=UserWarning)
    for _device in ("CPU", "CUDA"):
        _kernels.impl("unpack", _unpack, _device, allow_override=True)
    _kernels.impl("qbytes_mm", _bytes_product, "CPU", allow_override=True)


def group_size(width: int) -> int | None:
    """Inputs that share a scale and a shift in a layer of so many inputs, or None: all of a row do. It is quanto's choice for 4
    and 2 bits, taken for 3 bits too."""
    size: int | None = QLinear(width, 1, bias=False, weights=qint4, device="meta").weight_group_size
    return size


class Levels(NamedTuple):
    """Integers, and what makes weights of them: scale * integer - shift. A group has a row; groups follow one another as the
    weights of a layer [outputs, inputs] do, output by output."""

    integers: Tensor
    """uint8 [groups, weights of a group]."""
    scale: Tensor
    """[groups, 1], of the weights' dtype."""
    shift: Tensor
    """[groups, 1], of the weights' dtype."""

    def weights(self, shape: torch.Size) -> Tensor:
        """What quanto computes of them, of the scale's dtype."""
        return (self.scale * self.integers - self.shift).reshape(shape)

    def packed(self, shape: torch.Size, kind: qtype) -> WeightQBitsTensor:
        """quanto's tensor of these very integers, for a layer whose weights have this shape [outputs, inputs]."""
        stride = (shape[1], 1)
        return WeightQBitsTensor.create(kind, 0, group_size(shape[1]), shape, stride, *self)


def levels_of(weight: WeightQBitsTensor) -> Levels:
    """What quanto's tensor holds. Of those that it makes on a GPU for torch's int4 kernel the shifts are rounded."""
    plain = weight if type(weight) is WeightQBitsTensor else weight.weight_qbits_tensor()
    scale = plain._scale.reshape(-1, 1)
    return Levels(plain._data.unpack().reshape(len(scale), -1), scale, plain._shift.reshape(-1, 1))


def round_to_nearest(weight: Tensor, kind: qtype, optimizer: AffineOptimizer) -> Levels:
    """The level next to each of a linear layer's weights [outputs, inputs]; the optimizer chooses the levels of each group."""
    groups = weight.reshape(-1, group_size(weight.shape[1]) or weight.shape[1])
    scale, shift = optimizer.optimize(groups, kind, 0)
    return Levels(nearest_integers(groups, kind, scale, shift), scale, shift)


def nearest_integers(weights: Tensor, kind: qtype, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 [groups, n] of weights [groups, n], as quanto rounds them."""
    integers: Tensor = torch.ops.quanto.quantize_affine(weights, kind.bits, 0, None, scale, shift)
    return integers
