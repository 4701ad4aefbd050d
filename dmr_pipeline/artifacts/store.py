"""Artefacts: a stage's folder of files, published whole, described by a manifest, verified on every read.

`data/<recipe>/<stage>/` is the artefact and all of it is hashed; nothing in it differs from run to run. What does
differ (times, versions, machine) lies beside it in `<stage>.run.json`. The hash of a folder is DVC's own, so that one
number names an artefact in Dagster and in DVC.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from dmr_pipeline.artifacts.stage import DeclaredSections, Stage, StageContext
from dmr_pipeline.errors import FULL, UserError, causes
from dmr_pipeline.hashing import file_md5
from dmr_pipeline.pretrained import content_hash, pretrained_folders
from dmr_pipeline.recipe import Recipe, Runtime

log = logging.getLogger(__name__)

DATA_ROOT = Path("data")
MANIFEST = "manifest.json"
PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib"})
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
FULL_DISK_BYTES = 1 << 20


class Manifest(BaseModel):
    """What an artefact was made from and what it holds. Part of the hashed folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    stage: str
    recipe: str
    code_version: str
    sections: dict[str, JsonValue]
    """Content of the recipe sections that the stage reads, defaults filled in."""
    inputs: dict[str, str]
    """Input stage -> its folder's hash."""
    files: dict[str, str]
    """Path in the folder (posix) -> md5 of the file; the manifest itself is left out."""
    summary: dict[str, JsonValue]
    pretrained: dict[str, str] = Field({}, exclude_if=lambda folders: not folders)
    """Folder outside of the pipeline that a model was read from -> hash of its files."""

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


class _RecordPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class GitState(_RecordPart):
    commit: str
    clean: bool
    """No tracked file differed from the commit."""


class Machine(_RecordPart):
    system: str
    cpu: str
    cores: int | None


class Device(_RecordPart):
    """What the tensors were on."""

    name: str
    """Model of the GPU, or of the CPU."""
    cuda: str | None
    """CUDA version that torch was built for; None on a CPU."""


class RunRecord(_RecordPart):
    """The run that made an artefact: all that differs from run to run. Lies beside the hashed folder."""

    hash: str
    """Of the artefact that it made."""
    run_id: str | None
    """Of the orchestrator's run."""
    started: AwareDatetime
    finished: AwareDatetime
    seconds: float
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


@dataclass(frozen=True)
class Artifact:
    """An artefact that was verified."""

    path: Path
    hash: str
    """DVC's directory hash, '<md5>.dir'."""
    size: int
    """Bytes of all files."""
    manifest: Manifest


@dataclass(frozen=True)
class Materialized:
    artifact: Artifact
    skipped: bool
    """True where a valid artefact of the same inputs, recipe sections and code version was there already."""


@dataclass(frozen=True)
class Provenance:
    """All that decides an artefact's content."""

    stage: str
    recipe: str
    code_version: str
    sections: dict[str, JsonValue]
    inputs: dict[str, str]
    pretrained: dict[str, str]
    """Of the folders that are there: where one is not, a model that was read from it is taken to be the same."""

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, manifest: Manifest) -> str | None:
        """Why the manifest's artefact is stale, in a few words; None where it is current."""
        if manifest.code_version != self.code_version:
            return f"code version {manifest.code_version} -> {self.code_version}"
        sections = [name for name in self.sections if manifest.sections.get(name) != self.sections[name]]
        if sections or manifest.sections.keys() != self.sections.keys():
            return f"recipe changed: {', '.join(sections) or 'sections'}"
        inputs = [name for name in self.inputs if manifest.inputs.get(name) != self.inputs[name]]
        if inputs or manifest.inputs.keys() != self.inputs.keys():
            return f"input changed: {', '.join(inputs) or 'inputs'}"
        folders = [name for name in self.pretrained if manifest.pretrained.get(name) != self.pretrained[name]]
        if folders:
            return f"pretrained model changed: {', '.join(folders)}"
        return None


def artifact_folder(stage: str, recipe: str, data_root: Path = DATA_ROOT) -> Path:
    return data_root / recipe / stage


def incoming_folder(recipe: str, data_root: Path = DATA_ROOT) -> Path:
    """Where people drop new trajectories for a recipe."""
    return data_root / "incoming" / recipe


def sidecar_path(folder: Path) -> Path:
    """The unhashed record of the run that made the artefact in `folder`."""
    return folder.with_name(f"{folder.name}.run.json")


def read_run_record(artifact: Artifact) -> RunRecord | None:
    """The run that made the artefact; None where it was made elsewhere, so that no record of it, or one of another
    artefact, lies beside it."""
    record = run_record_beside(artifact.path)
    return record if record is not None and record.hash == artifact.hash else None


def run_record_beside(folder: Path) -> RunRecord | None:
    """The record beside an artefact's folder, which may be of an artefact that was there before; None where there is none,
    or a damaged one. Nothing depends on it."""
    sidecar = sidecar_path(folder)
    if not sidecar.is_file():
        return None
    try:
        return RunRecord.model_validate_json(sidecar.read_bytes())
    except ValidationError:
        log.warning("%s: the run record is damaged, what it told of the run is lost", sidecar)
        return None


def provenance(stage: Stage, recipe: Recipe, inputs: Mapping[str, str]) -> Provenance:
    """Args: inputs: input stage -> hash of its folder."""
    sections = {name: getattr(recipe, name).model_dump(mode="json") for name in stage.sections}
    model = stage.pretrained(recipe) if stage.pretrained is not None else None
    folders = pretrained_folders(model.model) if model is not None else []
    pretrained = {folder.as_posix(): content_hash(folder) for folder in folders}
    return Provenance(stage.name, recipe.name, stage.code_version, sections, dict(inputs), pretrained)


def hash_files(folder: Path) -> dict[str, str]:
    """md5 of every file in the folder, by its posix path relative to it."""
    return {path.relative_to(folder).as_posix(): file_md5(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def folder_hash(files: Mapping[str, str]) -> str:
    """DVC's hash of a folder with these files: md5 over the JSON list of {md5, relpath}, sorted by relpath."""
    entries = [{"md5": md5, "relpath": relpath} for relpath, md5 in sorted(files.items())]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def verify(folder: Path) -> Artifact:
    """Read the manifest of `data/<recipe>/<stage>` and compare every file with it.

    Raises:
        UserError: the artefact is missing, or a file of it is missing, changed or one too many.
    """
    command = f"dmr materialize {folder.name} --recipe {folder.parent.name}"
    remedy = remedies(folder)
    recover(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: make it with `{command}`")
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise UserError(f"{folder / MANIFEST} is missing or malformed: {remedy}") from error
    files = hash_files(folder)
    found = {relpath: md5 for relpath, md5 in files.items() if relpath != MANIFEST}
    for relpath in sorted(found.keys() | manifest.files.keys()):
        if found.get(relpath) != manifest.files.get(relpath):
            problem = (
                "is missing"
                if relpath not in found
                else "was changed"
                if relpath in manifest.files
                else "does not belong there"
            )
            raise UserError(f"{folder / relpath} {problem}: {remedy}")
    return Artifact(folder, folder_hash(files), sum((folder / relpath).stat().st_size for relpath in files), manifest)


def remedies(folder: Path) -> str:
    """What to do where the artefact of `data/<recipe>/<stage>` is damaged."""
    address = f"{folder.name} --recipe {folder.parent.name}"
    return f"get it back with `dmr restore {address}`, or make it again with `dmr materialize {address} --force`"


def materialize_stage(
    stage: Stage,
    recipe: Recipe,
    data_root: Path = DATA_ROOT,
    *,
    force: bool = False,
    run_id: str | None = None,
    expected: str | None = None,
    accept: Callable[[Artifact], None] = lambda _: None,
) -> Materialized:
    """Make a stage's artefact from its inputs' artefacts, unless a valid one of the same provenance is there already.

    Dagster and DVC both come here. A kill at any moment leaves the old artefact or the new one. One process at a time
    works on a stage of a recipe; a second one waits, and then finds the work done. A stage that keeps its history is
    given the artefact that it replaces.

    Args:
        run_id: the orchestrator's name of this run, for the record beside the artefact.
        expected: the only hash that the artefact may have, for a history that is recorded but lost.
        accept: called with each verified input before the stage runs, and with the artefact that is there already; raises
            where it must not be used.

    Raises:
        UserError: an input is missing or damaged, the disk is full, the committed artefact is damaged, the artefact is not
            the expected one, or the stage itself found bad input.
    """
    folder = artifact_folder(stage.name, recipe.name, data_root)
    with disk_full_is_user_error(folder, data_root):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            inputs = {name: verify(artifact_folder(name, recipe.name, data_root)) for name in stage.inputs}
            for artifact in inputs.values():
                accept(artifact)
            wanted = provenance(stage, recipe, {name: artifact.hash for name, artifact in inputs.items()})
            current = None if force else _current(folder, wanted, stage, accept)
            if _waiting(stage, recipe, data_root):
                current = None
            if current is not None:
                log.info("%s: up to date", stage.name)
            else:
                scratch = _scratch_folder(data_root, wanted)
                kept, anew = _kept_folder(data_root, wanted), scratch / "kept"
                context = StageContext(
                    DeclaredSections.of(recipe, stage.sections),
                    {name: artifact.path for name, artifact in inputs.items()},
                    new_folder(folder),
                    scratch,
                    _history(folder, accept) if stage.keeps_history else None,
                    incoming_folder(recipe.name, data_root),
                    anew if force else kept,
                )
                built = _build(stage, context, wanted, folder, run_id, expected)
                if force and anew.is_dir():
                    kept.parent.mkdir(exist_ok=True)
                    publish(anew, kept)
                shutil.rmtree(scratch.parent)
            if stage.after is not None:
                stage.after(data_root, recipe.name)
            return Materialized(current or built, skipped=current is not None)


def recover(folder: Path) -> None:
    """Put back the old artefact where a kill fell between the two renames of `publish`."""
    old = _old_folder(folder)
    if folder.exists() or not old.is_dir():
        return
    try:
        with FileLock(_lock_path(folder), timeout=0):
            _put_back(folder)
    except Timeout:
        return  # the process that publishes is alive and will finish


def _put_back(folder: Path) -> None:
    old = _old_folder(folder)
    if not folder.exists() and old.is_dir():
        old.rename(folder)


def _waiting(stage: Stage, recipe: Recipe, data_root: Path) -> bool:
    return stage.waiting is not None and bool(stage.waiting(data_root, recipe.name))


def _current(folder: Path, wanted: Provenance, stage: Stage, accept: Callable[[Artifact], None]) -> Artifact | None:
    """The artefact, where it is valid and of the wanted provenance."""
    if not folder.is_dir():
        return None
    try:
        artifact = verify(folder)
    except UserError as error:
        # Hours of training must not start because a file in Git was touched, and what a history holds is nowhere else.
        if wanted.recipe in stage.committed_recipes or stage.keeps_history:
            raise
        log.warning("%s; it is made again", error)
        return None
    accept(artifact)  # before it is compared: what a damaged manifest says of its provenance is worth nothing
    difference = wanted.difference(artifact.manifest)
    if difference is not None:
        log.info("%s: stale (%s)", folder.name, difference)
        return None
    return artifact


def _history(folder: Path, accept: Callable[[Artifact], None]) -> Path | None:
    """The artefact that the new one grows out of."""
    if not folder.is_dir():
        return None
    artifact = verify(folder)
    accept(artifact)
    return artifact.path


def _build(
    stage: Stage, context: StageContext, wanted: Provenance, folder: Path, run_id: str | None, expected: str | None
) -> Artifact:
    output = context.output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    log.info("%s: started", stage.name)
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        with recorded_log() as lines:
            result = stage.run(context)
        seconds = time.perf_counter() - clock
        files = hash_files(output)
        pickles = [relpath for relpath in files if Path(relpath).suffix in PICKLE_SUFFIXES]
        if pickles:
            raise UserError(
                f"{folder}: an artefact holds no pickles, found {', '.join(pickles)}: use safetensors, Parquet or JSON"
            )
        manifest = Manifest(**vars(wanted), files=files, summary=dict(result.summary))
        (output / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        made = folder_hash({**files, MANIFEST: file_md5(output / MANIFEST)})
        if expected not in (None, made):
            raise UserError(
                f"{folder} is missing, and its history, recorded as {expected}, must not start anew: `dmr restore {stage.name}"
                f" --recipe {context.recipe.name}` says what it lacks; or give it up by removing that entry of dvc.lock"
            )
        record = RunRecord(
            hash=made,
            run_id=run_id,
            started=started.replace(microsecond=0),
            finished=datetime.now(UTC).replace(microsecond=0),
            seconds=round(seconds, 3),
            git=git_state(),
            python=platform.python_version(),
            libraries={name: installed_version(name) for name in RECORDED_LIBRARIES},
            machine=this_machine(),
            device=this_device(context.recipe.runtime),
            runtime=context.recipe.runtime,
            measured=dict(result.measured),
            log=lines,
        )
        write_run_record(folder, record)
        publish(output, folder)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    log.info("%s: done in %.1f s", stage.name, seconds)
    return verify(folder)


def publish(output: Path, folder: Path) -> None:
    """Two renames, since no portable one replaces a folder that is not empty; `recover` mends a kill between them."""
    old = _old_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    output.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def new_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _old_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    lock = FileLock(_lock_path(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process works on it, waiting", folder.name)
        lock.acquire()
    try:
        _put_back(folder)  # only now: the process that was waited for may have been killed between its renames
        yield
    finally:
        lock.release()


def _scratch_folder(data_root: Path, wanted: Provenance) -> Path:
    """Resume state of exactly this provenance; what an other one left behind is dropped, never resumed from."""
    stage_scratch = data_root / "scratch" / wanted.recipe / wanted.stage
    scratch = stage_scratch / wanted.fingerprint()
    scratch.mkdir(parents=True, exist_ok=True)
    for other in stage_scratch.iterdir():
        if other != scratch:
            shutil.rmtree(other)
    return scratch


def _kept_folder(data_root: Path, wanted: Provenance) -> Path:
    """What runs of this code version have kept; what others have is dropped."""
    stage_kept = data_root / "scratch" / wanted.recipe / f"{wanted.stage}.kept"
    kept = stage_kept / wanted.code_version
    for other in stage_kept.glob("*"):
        if other != kept:
            shutil.rmtree(other)
    return kept


@contextmanager
def disk_full_is_user_error(folder: Path, data_root: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_disk_full(error, data_root):
            raise UserError(
                f"no space left on the disk of {data_root.resolve()} while making {folder}: free some, run again"
            ) from error
        raise


def _is_disk_full(error: BaseException, data_root: Path) -> bool:
    """Also true where a library hides the reason (torch.save does): then the disk itself is asked."""
    for seen in causes(error):
        if (isinstance(seen, OSError) and seen.errno in FULL) or "No space left on device" in str(seen):
            return True
    return data_root.is_dir() and shutil.disk_usage(data_root).free < FULL_DISK_BYTES


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
    part = folder.with_name(f".{folder.name}.run.json.part")
    part.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    part.replace(sidecar_path(folder))


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
