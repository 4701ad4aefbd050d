"""The record of the run that made an artifact, beside its folder: all that differs from run to run."""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, JsonValue, ValidationError

from dmr_pipeline.artifacts.folders import sidecar_path
from dmr_pipeline.artifacts.manifest import Artifact
from dmr_pipeline.atomic import replaced
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.recipe.runtime import Runtime

log = logging.getLogger(__name__)

RECORDED_LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "optimum-quanto",
    "tokenizers",
    "safetensors",
    "numpy",
    "polars",
)


class GitState(FrozenModel):
    commit: str
    clean: bool
    """No tracked file differed from the commit."""


class Machine(FrozenModel):
    system: str
    cpu: str
    cores: int | None


class Device(FrozenModel):
    """What the tensors were on."""

    name: str
    """Model of the GPU, or of the CPU."""
    cuda: str | None
    """CUDA version that torch was built for; None on a CPU."""


class RunRecord(FrozenModel):
    """The run that made an artifact: all that differs from run to run. Lies beside the hashed folder."""

    hash: str
    """Of the artifact that it made."""
    run_id: str | None
    """Of the orchestrator's run."""
    started: AwareDatetime
    finished: AwareDatetime
    seconds: float
    peak_bytes: int | None = None
    """The most memory that the process and its children held, pages of files aside; None where the system does not tell."""
    peak_gpu_bytes: int | None = None
    """The most that torch held on the GPU; None on a CPU."""
    git: GitState | None
    """None outside of a Git checkout."""
    python: str
    libraries: dict[str, str | None]
    """Versions; None where a library is not installed."""
    machine: Machine
    device: Device
    runtime: Runtime
    measured: dict[str, JsonValue]
    log: list[str]


def read_run_record(artifact: Artifact) -> RunRecord | None:
    """The run that made the artifact; None where it was made elsewhere, so that no record of it, or one of another
    artifact, lies beside it."""
    record = run_record_beside(artifact.path)
    return record if record is not None and record.hash == artifact.hash else None


def run_record_beside(folder: Path) -> RunRecord | None:
    """The record beside an artifact's folder, which may be of an artifact that was there before; None where there is none,
    or a damaged one. Nothing depends on it."""
    sidecar = sidecar_path(folder)
    if not sidecar.is_file():
        return None
    try:
        return RunRecord.model_validate_json(sidecar.read_bytes())
    except ValidationError:
        log.warning("%s: the run record is damaged, what it told of the run is lost", sidecar)
        return None


@contextmanager
def recorded_log() -> Iterator[list[str]]:
    """Collect what the package logs meanwhile."""
    lines: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(
                f"{datetime.fromtimestamp(record.created, UTC):%H:%M:%S} {record.levelname} {record.getMessage()}"
            )

    recorder, package = Recorder(logging.INFO), logging.getLogger("dmr_pipeline")
    package.handlers.insert(0, recorder)  # before Dagster's, which rewrites the messages it is given
    try:
        yield lines
    finally:
        package.removeHandler(recorder)


def write_run_record(folder: Path, record: RunRecord) -> None:
    with replaced(sidecar_path(folder)) as part:
        part.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def installed_version(name: str) -> str | None:
    import importlib.metadata  # with all that reads e-mails

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def this_machine() -> Machine:
    return Machine(system=platform.platform(), cpu=_cpu_model(), cores=os.cpu_count())


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def this_device(runtime: Runtime) -> Device:
    """The GPU where this process has computed on it. Who has not imported torch has not."""
    torch = sys.modules.get("torch")
    if torch is not None and runtime.device != "cpu" and torch.cuda.is_initialized():
        return Device(name=torch.cuda.get_device_name(), cuda=torch.version.cuda)
    return Device(name=_cpu_model(), cuda=None)


def reset_gpu_peak() -> None:
    """Let `gpu_peak` tell of what comes from here on."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def gpu_peak(runtime: Runtime) -> int | None:
    """The most that torch has held on the GPU, in bytes; None where this process has not computed on one."""
    torch = sys.modules.get("torch")
    if torch is None or runtime.device == "cpu" or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


def git_state() -> GitState | None:
    """Of the working directory's checkout; None where there is none, or no git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        # The stages before this one have changed dvc.lock; what a checkout is clean of is changes to code and recipes.
        tracked = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock"]
        changes = subprocess.run(tracked, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return GitState(commit=commit, clean=not changes)
