"""What a check of a GPU writes down: for each part its outcome, time, memory and figures, as one JSON file."""

import gc
import logging
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import psutil
import torch
from pydantic import BaseModel, ConfigDict

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "optimum-quanto", "trl", "peft", "accelerate", "tokenizers", "numpy")

Value = str | int | float | bool | None


class Skipped(Exception):
    """A part, or the rest of it, cannot be run here; the message says why."""


class Check(BaseModel):
    """Something that must hold."""

    model_config = ConfigDict(extra="forbid")

    what: str
    passed: bool
    found: str


class Part(BaseModel):
    """One part of the check."""

    model_config = ConfigDict(extra="forbid")

    name: str
    outcome: Literal["passed", "failed", "skipped"] = "passed"
    problem: str | None = None
    """Why it failed or was skipped."""
    seconds: float = 0.0
    peak_gpu_bytes: int | None = None
    """The most that torch had allocated on the GPU at once."""
    units: dict[str, str] = {}
    """Column -> unit, of the columns of `rows` that are measured."""
    rows: list[dict[str, Value]] = []
    """Figures."""
    checks: list[Check] = []
    left_out: list[str] = []
    """What was not measured, each with the reason."""

    def row(self, **values: Value) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        self.rows.append(rounded)
        log.info("  %s", "  ".join(f"{k}={v}" for k, v in rounded.items()))

    def check(self, what: str, passed: bool, found: object) -> None:
        """Write down whether something holds; the part goes on."""
        self.checks.append(Check(what=what, passed=passed, found=str(found)))
        log.info("  %s: %s (%s)", what, "holds" if passed else "DOES NOT HOLD", found)

    def leave_out(self, what: str) -> None:
        self.left_out.append(what)
        log.info("  left out: %s", what)


class Record(BaseModel):
    """The whole check."""

    model_config = ConfigDict(extra="forbid")

    date: str
    """UTC."""
    tiny: bool
    """Small shapes: whether everything runs. Its figures say nothing of the hardware."""
    hardware: dict[str, Value]
    versions: dict[str, str]
    note: str = ""
    """What a reader must know of how it was run."""
    seconds: float = 0.0
    parts: list[Part] = []

    @property
    def passed(self) -> bool:
        return all(part.outcome != "failed" for part in self.parts)


def run_part(name: str, work: Callable[[Part], None], device: torch.device) -> Part:
    """Run one part; whatever it raises is its failure, and no other part's."""
    part = Part(name=name)
    log.info("%s", name)
    _release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    try:
        work(part)
    except Skipped as reason:
        part.outcome, part.problem = "skipped", str(reason)
    except Exception as error:  # noqa: BLE001 - a library's failure on this GPU is a finding, and the other parts go on
        part.outcome, part.problem = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        log.error("%s", traceback.format_exc())
    else:
        broken = [check.what for check in part.checks if not check.passed]
        if broken:
            part.outcome, part.problem = "failed", f"does not hold: {'; '.join(broken)}"
    part.seconds = round(time.perf_counter() - started, 2)
    if device.type == "cuda":
        part.peak_gpu_bytes = torch.cuda.max_memory_allocated(device)
    log.info("%s: %s in %.1f s%s", name, part.outcome, part.seconds, f" ({part.problem})" if part.problem else "")
    return part


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def new_record(tiny: bool, device: torch.device) -> Record:
    hardware: dict[str, Value] = {
        "machine": platform.machine(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device.type,
    }
    versions = {"python": platform.python_version()} | _versions(_PACKAGES)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_cache_bytes": properties.L2_cache_size,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
        versions["cuda"] = str(torch.version.cuda)
    return Record(date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", tiny=tiny, hardware=hardware, versions=versions)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
