"""Linear layers as GPTQ and AWQ checkpoints store them: low-bit integers in 32-bit words, with a scale and a zero for each
group of inputs and each output.

GPTQ's layout is AutoGPTQ's (github.com/AutoGPTQ/AutoGPTQ, nn_modules/qlinear), which GPTQModel, transformers and vLLM read;
AWQ's is AutoAWQ's GEMM layout (github.com/casper-hansen/AutoAWQ, modules/linear/gemm.py). A weight is
scale * (integer - zero), computed here in float32.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dmr_pipeline.errors import UserError

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Of one layer; `g_idx` (GPTQ's group of each input) may be left out where groups are consecutive inputs."""
_AWQ_COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word the 4 bits of each of its eight consecutive outputs are."""


class Layout(NamedTuple):
    """What is the same in all layers of a checkpoint."""

    method: Literal["gptq", "awq"]
    bits: int
    group_size: int
    """Inputs; -1 is all of them."""
    zeros_less_one: bool = False
    """Whether zeros are stored less one, as in GPTQ's first format."""

    def groups(self, inputs: int) -> int:
        return 1 if self.group_size == -1 else math.ceil(inputs / self.group_size)

    def shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """Those of a layer's parts."""
        groups, words = self.groups(inputs), outputs * self.bits // 32
        packed = (inputs * self.bits // 32, outputs) if self.method == "gptq" else (inputs, words)
        shapes = {"qweight": packed, "qzeros": (groups, words), "scales": (groups, outputs)}
        return shapes | ({"g_idx": (inputs,)} if self.method == "gptq" else {})


def layout_of(method: str, settings: Mapping[str, object]) -> Layout:
    """The layout that a checkpoint's quantization settings name.

    Raises:
        UserError: it is none of those that are read here; the message says which are.
    """
    bits = settings.get("bits", settings.get("w_bit", 4))
    group_size = settings.get("group_size", settings.get("q_group_size", 128))
    said = settings.get("checkpoint_format") or settings.get("version") or settings.get("format")
    kind = str(said or ("gemm" if method == "awq" else "gptq")).lower()
    kind = "marlin" if settings.get("is_marlin_format") else kind
    dynamic = settings.get("dynamic")
    if method not in ("gptq", "awq"):
        raise UserError(f"its weights are quantized by {method}; gptq, awq and GGUF files can be imported")
    if method == "gptq" and (kind not in ("gptq", "gptq_v2") or bits not in (2, 3, 4, 8)):
        raise UserError(
            f"gptq of the format {kind!r} in {bits} bits; 'gptq' and 'gptq_v2' in 2, 3, 4 or 8 can be imported"
        )
    if method == "awq" and (kind != "gemm" or bits != 4):
        raise UserError(f"awq of the format {kind!r} in {bits} bits; 'gemm' in 4 bits can be imported")
    if isinstance(dynamic, Mapping) and any(not str(pattern).startswith("-:") for pattern in dynamic):
        raise UserError("its layers have settings of their own ('dynamic'); one number of bits for all can be imported")
    if not isinstance(bits, int) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise UserError(f"its groups have {group_size!r} inputs; a count, or -1 for all of them, can be imported")
    return Layout("gptq" if method == "gptq" else "awq", bits, group_size, kind == "gptq")


def dequantize_layer(layout: Layout, parts: Mapping[str, Tensor]) -> Tensor:
    """A layer's weight [outputs, inputs], float32, of its parts by name.

    Raises:
        UserError: inputs are of a group that is not there.
    """
    scales = parts["scales"].float()
    if layout.method == "awq":
        integers, zeros = (_awq_columns(unpack(parts[part], layout.bits)) for part in ("qweight", "qzeros"))
    else:
        integers, zeros = unpack(parts["qweight"].T, layout.bits).T, _gptq_zeros(layout, parts["qzeros"])
    inputs, groups = integers.shape[0], scales.shape[0]
    size = inputs if layout.group_size == -1 else layout.group_size
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs, device=scales.device) // size
    if int(group.min()) < 0 or int(group.max()) >= groups:
        raise UserError(f"g_idx names groups from {int(group.min())} to {int(group.max())}, but there are {groups}")
    return ((integers - zeros[group]) * scales[group]).T


def unpack(words: Tensor, bits: int) -> Tensor:
    """The integers [..., 32 n / bits] in words [..., n] of int32, whose last axis is one string of bits, lowest first. Only
    those of 3 bits reach from one word into the next."""
    mask = 2**bits - 1
    if 32 % bits == 0:
        return ((words.unsqueeze(-1) >> torch.arange(0, 32, bits, device=words.device)) & mask).flatten(-2).int()
    first = torch.arange(0, 32 * words.shape[-1], bits, device=words.device)[: 32 * words.shape[-1] // bits]
    unsigned = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    both = unsigned[..., first // 32] | unsigned[..., first // 32 + 1] << 32
    return ((both >> (first % 32)) & mask).int()


def _gptq_zeros(layout: Layout, words: Tensor) -> Tensor:
    """Where they are stored less one, GPTQModel has taken the ones from whole words, so that a zero of 0 borrows from the next
    one: adding them to words undoes that. Zeros of 3 bits, which reach over the ends of words, are less one each."""
    if not layout.zeros_less_one:
        return unpack(words, layout.bits)
    if layout.bits == 3:
        return (unpack(words, 3) + 1) & 7
    return unpack(words.long() + sum(1 << place for place in range(0, 32, layout.bits)), layout.bits)


def _awq_columns(integers: Tensor) -> Tensor:
    return integers.unflatten(-1, (-1, 8))[..., _AWQ_COLUMNS].flatten(-2)
