"""The check of a GPU: all its parts, one after the other, and the file that says how they went."""

import time
from pathlib import Path

import torch

from dmr_pipeline.agent.checkpoint import resolve_device
from dmr_pipeline.errors import UserError
from dmr_pipeline.gpu_check import agents
from dmr_pipeline.gpu_check.decoding import decoding
from dmr_pipeline.gpu_check.kernels import low_bit_kernels
from dmr_pipeline.gpu_check.page import tables
from dmr_pipeline.gpu_check.record import Record, new_record, run_part
from dmr_pipeline.gpu_check.sizes import FULL, TINY


def check_gpu(tiny: bool, output: Path, data: Path) -> Record:
    """Run every part; `output` is written after each, so that a killed check leaves what it found.

    Args:
        tiny: small shapes, on the GPU where there is one and on the CPU otherwise.
        output: JSON; its tables go beside it, as Markdown.
        data: the project's data folder, with the committed agent.

    Raises:
        UserError: there is no GPU, and the check is not a tiny one.
    """
    device, sizes = resolve_device("auto"), TINY if tiny else FULL
    if device.type != "cuda" and not tiny:
        raise UserError("torch sees no GPU here; `dmr bench gpu --tiny` tries on the CPU whether every part runs")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # some images of NVIDIA's let float32 be multiplied as TF32
    started = time.perf_counter()
    agent = agents.TinyAgent(device, sizes, data)

    def left() -> float:
        return sizes.seconds - (time.perf_counter() - started)

    parts = {
        "quantize, save, reload": lambda part: agents.rungs_reload(agent, part),
        "actions equal to the CPU's": lambda part: agents.same_actions(agent, part),
        "steps a second": lambda part: agents.speed(agent, part),
        "low-bit kernels": lambda part: low_bit_kernels(sizes, device, part),
        "two GRPO updates": lambda part: agents.two_grpo_updates(agent, part),
        "out of memory": lambda part: agents.halved_batches(agent, part),
        "decoding at the shapes of real models": lambda part: decoding(sizes, device, part, left),
    }
    record = new_record(tiny, device)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, work in parts.items():
        record.parts.append(run_part(name, work, device))
        record.seconds = round(time.perf_counter() - started, 1)
        output.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(tables(record), encoding="utf-8")
    return record
