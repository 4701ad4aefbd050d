"""How a stage's artifact is made: unless it is there already, from verified inputs, published whole."""

import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dmr_pipeline.artifacts.folders import DATA_ROOT, artifact_folder, incoming_folder, locked, publish, published
from dmr_pipeline.artifacts.full_disk import disk_full_is_user_error
from dmr_pipeline.artifacts.manifest import MANIFEST, Artifact, folder_hash, verify, write_manifest
from dmr_pipeline.artifacts.provenance import Provenance, provenance
from dmr_pipeline.artifacts.run_record import (
    RECORDED_LIBRARIES,
    RunRecord,
    git_state,
    gpu_peak,
    installed_version,
    recorded_log,
    reset_gpu_peak,
    this_device,
    this_machine,
    write_run_record,
)
from dmr_pipeline.artifacts.stage import DeclaredSections, Stage, StageContext
from dmr_pipeline.errors import UserError
from dmr_pipeline.hashing import file_md5
from dmr_pipeline.peak_memory import watched_memory
from dmr_pipeline.recipe import Recipe

log = logging.getLogger(__name__)

PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib"})


@dataclass(frozen=True)
class Materialized:
    artifact: Artifact
    skipped: bool
    """True where a valid artifact of the same inputs, recipe sections and code version was there already."""


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
    """Make a stage's artifact from its inputs' artifacts, unless a valid one of the same provenance is there already.

    Dagster and DVC both come here. A kill at any moment leaves the old artifact or the new one. One process at a time
    works on a stage of a recipe; a second one waits, and then finds the work done. A stage that keeps its history is
    given the artifact that it replaces.

    Args:
        run_id: the orchestrator's name of this run, for the record beside the artifact.
        expected: the only hash that the artifact may have, for a history that is recorded but lost.
        accept: called with each verified input before the stage runs, and with the artifact that is there already; raises
            where it must not be used.

    Raises:
        UserError: an input is missing or damaged, the disk is full, the committed artifact is damaged, the artifact is not
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
                with published(folder) as output:
                    context = StageContext(
                        DeclaredSections.of(recipe, stage.sections),
                        {name: artifact.path for name, artifact in inputs.items()},
                        output,
                        scratch,
                        _history(folder, accept) if stage.append_only else None,
                        incoming_folder(recipe.name, data_root),
                        anew if force else kept,
                    )
                    record = _build(stage, context, wanted, folder, run_id, expected)
                log.info("%s: done in %.1f s", stage.name, record.seconds)
                built = verify(folder)
                if force and anew.is_dir():
                    kept.parent.mkdir(exist_ok=True)
                    publish(anew, kept)
                shutil.rmtree(scratch.parent)
            if stage.on_published is not None:
                stage.on_published(data_root, recipe.name)
            return Materialized(current or built, skipped=current is not None)


def _waiting(stage: Stage, recipe: Recipe, data_root: Path) -> bool:
    return stage.pending_inputs is not None and bool(stage.pending_inputs(data_root, recipe.name))


def _current(folder: Path, wanted: Provenance, stage: Stage, accept: Callable[[Artifact], None]) -> Artifact | None:
    """The artifact, where it is valid and of the wanted provenance."""
    if not folder.is_dir():
        return None
    try:
        artifact = verify(folder)
    except UserError as error:
        # Hours of training must not start because a file in Git was touched, and what a history holds is nowhere else.
        if wanted.recipe in stage.committed_recipes or stage.append_only:
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
    """The artifact that the new one grows out of."""
    if not folder.is_dir():
        return None
    artifact = verify(folder)
    accept(artifact)
    return artifact.path


def _build(
    stage: Stage, context: StageContext, wanted: Provenance, folder: Path, run_id: str | None, expected: str | None
) -> RunRecord:
    """Let the stage write, and add its manifest; the record of the run goes beside the artifact that is to be."""
    output = context.output
    log.info("%s: started", stage.name)
    started, clock = datetime.now(UTC), time.perf_counter()
    reset_gpu_peak()
    before = {path: (path / MANIFEST).read_bytes() for path in context.inputs.values()}
    with recorded_log() as lines, watched_memory() as peak:
        result = stage.run(context)
    for path, described in before.items():
        if not (path / MANIFEST).is_file() or (path / MANIFEST).read_bytes() != described:
            raise UserError(
                f"{path} was made again while {stage.name} read it, by another process: run the same command again"
            )
    seconds = time.perf_counter() - clock
    manifest = write_manifest(output, **vars(wanted), summary=result.summary)
    pickles = [relpath for relpath in manifest.files if Path(relpath).suffix in PICKLE_SUFFIXES]
    if pickles:
        raise UserError(
            f"{folder}: an artifact holds no pickles, found {', '.join(pickles)}: use safetensors, Parquet or JSON"
        )
    made = folder_hash({**manifest.files, MANIFEST: file_md5(output / MANIFEST)})
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
        peak_bytes=peak.bytes,
        peak_gpu_bytes=gpu_peak(context.recipe.runtime),
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
    return record


def _scratch_folder(data_root: Path, wanted: Provenance) -> Path:
    """Resume state of exactly this provenance; what an other one left behind is dropped, never resumed from."""
    stage_scratch = data_root / "scratch" / wanted.recipe / wanted.stage
    scratch = stage_scratch / wanted.fingerprint()
    scratch.mkdir(parents=True, exist_ok=True)
    for other in stage_scratch.iterdir():
        if other != scratch:
            shutil.rmtree(other)
    return scratch


def kept_folder(stage: str, recipe: str, data_root: Path) -> Path:
    """Of what runs of a stage keep for later ones, a folder in it for each code version. It need not exist."""
    return data_root / "scratch" / recipe / f"{stage}.kept"


def _kept_folder(data_root: Path, wanted: Provenance) -> Path:
    """What runs of this code version have kept; what others have is dropped."""
    stage_kept = kept_folder(wanted.stage, wanted.recipe, data_root)
    kept = stage_kept / wanted.code_version
    for other in stage_kept.glob("*"):
        if other != kept:
            shutil.rmtree(other)
    return kept
