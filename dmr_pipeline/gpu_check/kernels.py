"""Products of few rows with the weights of real layers: bfloat16, torch's low-bit kernels, and quanto's way.

At so few rows a product is as quick as its weights can be read: what counts is bytes over the memory's bandwidth.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from optimum.quanto import QLinear, qint2, qint4, qint8, qtype
from torch import Tensor, nn

from dmr_pipeline.gpu_check.record import Part
from dmr_pipeline.gpu_check.sizes import Sizes

log = logging.getLogger(__name__)

GROUPS = (32, 64, 128)
ROWS = (1, 8)
TOLERANCE = 1e-2
"""‖product - that of the dequantized weights in float32‖ / ‖that‖; operands in bfloat16 give 1e-3 to 1e-2."""
_REPEATS = 7
_MOST_COPIES = 64
_INNER_TILES = 8
"""How torch's int4 kernels tile the inputs of packed weights."""


@dataclass(frozen=True)
class Product:
    """Weights in one form, and what multiplies rows with them."""

    apply: Callable[[Tensor], Tensor]
    """Rows [n, inputs] -> [n, outputs]."""
    weights: Callable[[], Tensor]
    """The weights that it stands for, float32 [outputs, inputs]."""
    bytes: int
    """That it reads of them."""


Method = Callable[[int, int], Product]
"""(inputs, outputs) -> a product with random weights."""


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    moved, seconds = _copied(device, size)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # or what lives long, such as cuBLAS' workspace, is cut out of these blocks and keeps them
    return moved / seconds


def _copied(device: torch.device, size: int) -> tuple[int, float]:
    source = torch.empty(size // 4, device=device).uniform_()
    target = torch.empty_like(source)
    return 2 * source.nbytes, timed([lambda: target.copy_(source)] * 3, device).seconds


class Timing(NamedTuple):
    seconds: float
    """Of one call."""
    launching: bool
    """Whether the time that it takes to launch its kernels is in it."""


def timed(calls: Sequence[Callable[[], object]], device: torch.device) -> Timing:
    """Median over repeats of all calls one after the other, divided by their number.

    On a GPU they are captured in a graph first: what is timed is the GPU, not the launching of its kernels. What cannot be
    captured is timed with the launching.
    """
    if device.type == "cpu":
        return Timing(median(_wall(calls) for _ in range(3)) / len(calls), True)

    def one_by_one() -> None:
        for call in calls:
            call()

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(warm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            one_by_one()
        repeat, captured = graph.replay, True
    except RuntimeError as error:
        log.info("  not captured: %s", _line(error))
        torch.cuda.synchronize()
        repeat, captured = one_by_one, False
    repeat()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        repeat()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return Timing(median(times) / len(calls), not captured)


def _wall(calls: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def methods(device: torch.device) -> dict[str, Method]:
    """Name -> how weights are held. On a CPU torch's int8 kernel is left out: in torch 2.13 it can crash the process."""
    found: dict[str, Method] = {"bfloat16": lambda i, o: _plain(i, o, device)}
    found |= {f"torch int4, groups of {g}": _int4_of(g, device) for g in GROUPS}
    if device.type == "cuda":
        found["torch int8"] = lambda i, o: _int8(i, o, device)
        found["quanto int8"] = _quanto_of(qint8, device)
    found["quanto int4"] = _quanto_of(qint4, device)
    found["quanto int2"] = _quanto_of(qint2, device)
    return found


def _plain(inputs: int, outputs: int, device: torch.device) -> Product:
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
    return Product(lambda rows: nn.functional.linear(rows, weight), weight.float, weight.nbytes)


def _int4_of(group: int, device: torch.device) -> Method:
    def product(inputs: int, outputs: int) -> Product:
        integers = torch.randint(16, (outputs, inputs), device=device, dtype=torch.int32)
        scale = (0.1 + torch.rand(outputs, inputs // group, device=device)).mul(inputs**-0.5).bfloat16()
        zero = torch.randn(outputs, inputs // group, device=device).mul(inputs**-0.5).bfloat16()
        both = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()
        if device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, _INNER_TILES)
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            pairs = (integers[:, ::2] << 4 | integers[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_TILES)
            multiply = torch.ops.aten._weight_int4pack_mm

        def weights() -> Tensor:
            grouped = (integers - 8).float().view(outputs, -1, group)
            return (grouped * scale.float()[..., None] + zero.float()[..., None]).view(outputs, inputs)

        return Product(lambda rows: multiply(rows, packed, group, both), weights, packed.nbytes + both.nbytes)

    return product


def _int8(inputs: int, outputs: int, device: torch.device) -> Product:
    integers = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8)
    scale = (0.1 + torch.rand(outputs, device=device)).mul(inputs**-0.5 / 64).bfloat16()
    return Product(
        lambda rows: torch.ops.aten._weight_int8pack_mm(rows, integers, scale),
        lambda: integers.float() * scale.float()[:, None],
        integers.nbytes + scale.nbytes,
    )


def _quanto_of(weights: qtype, device: torch.device) -> Method:
    def product(inputs: int, outputs: int) -> Product:
        plain = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
        layer = QLinear.from_module(plain, weights=weights)
        layer.freeze()
        # quanto also keeps a scale for the layer's inputs and one for its outputs, which nothing reads here.
        stored = sum(t.nbytes for name, t in layer.state_dict().items() if name.startswith("weight"))
        return Product(layer, lambda: layer.weight.dequantize().float(), stored)

    return product


@torch.no_grad()
def low_bit_kernels(sizes: Sizes, device: torch.device, part: Part) -> None:
    """Each way of holding weights, at every shape of the models' layers: right, and how near the bandwidth."""
    part.units = {"time": "µs", "weights": "B", "speed": "GB/s", "of_bandwidth": "share", "error": "relative"}
    copied = bandwidth(device, sizes.copied_bytes)
    part.row(what="copy, bytes read and written", speed=copied / 1e9)
    worst: dict[str, float] = {}
    for shape in sizes.shapes:
        for layer, (inputs, outputs) in shape.linear_layers.items():
            for name, method in methods(device).items():
                try:
                    _measure(
                        f"{shape.name} {layer}", name, method, (inputs, outputs), sizes, copied, worst, device, part
                    )
                except NotImplementedError as error:  # torch has no such kernel for this device
                    part.leave_out(f"{shape.name} {layer}, {name}: {_line(error)}")
                except RuntimeError as error:
                    part.check(f"{shape.name} {layer}, {name}: runs", False, _line(error))
    for name, found in worst.items():
        part.check(
            f"{name}: product of the dequantized weights", found <= TOLERANCE, f"relative error at most {found:.2g}"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _measure(
    layer: str,
    name: str,
    method: Method,
    shape: tuple[int, int],
    sizes: Sizes,
    copied: float,
    worst: dict[str, float],
    device: torch.device,
    part: Part,
) -> None:
    inputs, outputs = shape
    first = method(inputs, outputs)
    others = min(_MOST_COPIES, sizes.rotated_bytes // first.bytes)
    products = [first, *(method(inputs, outputs) for _ in range(others))]
    for count in ROWS:
        rows = torch.randn(count, inputs, device=device, dtype=torch.bfloat16)
        expected = rows.float() @ first.weights().T
        error = float((first.apply(rows).float() - expected).norm() / expected.norm())
        worst[name] = max(worst.get(name, 0.0), error)
        seconds, launching = timed([partial(product.apply, rows) for product in products], device)
        part.row(
            layer=layer,
            shape=f"{inputs} to {outputs}",
            method=name,
            rows=count,
            time=seconds * 1e6,
            weights=first.bytes,
            speed=first.bytes / seconds / 1e9,
            of_bandwidth=first.bytes / seconds / copied,
            error=error,
            launching_included=launching,
        )
