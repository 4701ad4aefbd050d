"""DVC's side: `dvc.yaml` is rendered from the pipeline table, and what Dagster materialises is committed to DVC.

All paths are relative to the project's folder, which is the working directory.
"""

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml
from ruamel.yaml import YAML

from dmr_pipeline import interrupts
from dmr_pipeline.artifacts import Artifact, artifact_folder
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import RECIPE_FOLDER
from dmr_pipeline.stage import Stage

if TYPE_CHECKING:
    from dvc.repo import Repo

log = logging.getLogger(__name__)

DVC_FILE = Path("dvc.yaml")
LOCK_FILE = Path("dvc.lock")
RWLOCK = Path(".dvc/tmp/rwlock")
"""DVC refuses a command on files that are noted here, whatever its option --wait-for-lock says."""
BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")
POLL_SECONDS = 1.0
HEADER = "# Rendered from the table in dmr_pipeline/pipeline.py by `dmr render`: change that, not this.\n"


def stage_address(stage: Stage, recipe: str) -> str:
    """DVC's name of a stage for one recipe, such as `agent@alfworld-tiny`: how DVC itself names a matrix stage."""
    return f"{stage.name}@{recipe}"


def stage_command(stage: Stage, recipe: str) -> str:
    """The code version is in the command, since DVC goes stale when a command changes."""
    return f"dmr materialize {stage.name} --recipe {recipe} --code-version {stage.code_version}"


def render(stages: Sequence[Stage], recipes: Sequence[str]) -> str:
    """Content of `dvc.yaml`: one matrix stage over all recipes for each row of the table."""
    rendered = {stage.name: _render_stage(stage, recipes) for stage in stages}
    return HEADER + yaml.safe_dump({"stages": rendered}, sort_keys=False, width=1000)


def _render_stage(stage: Stage, recipes: Sequence[str]) -> dict[str, Any]:
    recipe = "${item.recipe}"
    # `dvc repro` would delete an output before the command runs: `persist` leaves that to our own atomic replacement,
    # so that a kill loses nothing and an artefact that is still current is not made again.
    options: dict[str, bool] = {"persist": True}
    if stage.committed:
        options["cache"] = False
    return {
        "matrix": {"recipe": list(recipes)},
        "desc": stage.description,
        "cmd": stage_command(stage, recipe),
        **({"deps": [artifact_folder(name, recipe).as_posix() for name in stage.inputs]} if stage.inputs else {}),
        "params": [{f"{RECIPE_FOLDER}/{recipe}.yaml": list(stage.sections)}],
        "outs": [{artifact_folder(stage.name, recipe).as_posix(): options}],
    }


def is_rendered(stages: Sequence[Stage], recipes: Sequence[str], file: Path = DVC_FILE) -> bool:
    """Does the file say what the table says?"""
    return file.is_file() and file.read_text(encoding="utf-8") == render(stages, recipes)


def check_rendered(stages: Sequence[Stage], recipes: Sequence[str], file: Path = DVC_FILE) -> None:
    """Raises: UserError: the file differs from the table or from the folder of recipes."""
    if not is_rendered(stages, recipes, file):
        raise UserError(f"{file} is not what the pipeline table and {RECIPE_FOLDER}/ say: run `dmr render`")


@contextmanager
def repository() -> Iterator["Repo"]:
    """The DVC project around the working directory. What DVC refuses meanwhile is a UserError."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            yield repo
    except DvcException as error:
        raise UserError(f"DVC: {' '.join(str(error).split())}") from error


@contextmanager
def dvc_at_rest() -> Iterator[None]:
    """Holds DVC's own lock, and waits for it: DVC writes `dvc.lock` in place, so whoever reads it meanwhile sees a part.

    Raises:
        UserError: the working directory is in no DVC project.
    """
    from dvc.lock import make_lock

    with repository() as repo:
        hardlinks = repo.config["core"].get("hardlink_lock", False)
        with make_lock(repo.lock.lockfile, tmp_dir=repo.tmp_dir, hardlink_lock=hardlinks, wait=True):
            yield


def lock_entry(stage: Stage, recipe: str) -> Mapping[str, Any] | None:
    """What `dvc.lock` records of a stage; None where it has no entry."""
    if not LOCK_FILE.is_file():
        return None
    with dvc_at_rest():
        lock = LOCK_FILE.read_text(encoding="utf-8")
    entry: Mapping[str, Any] | None = (_yaml().load(lock) or {}).get("stages", {}).get(stage_address(stage, recipe))
    return entry


def recorded_outputs(entry: Mapping[str, Any]) -> dict[str, str | None]:
    """Path -> hash of the outputs of an entry in `dvc.lock`."""
    return {out["path"]: out.get("md5") for out in entry.get("outs", [])}


def has_provenance(entry: Mapping[str, Any], stage: Stage, recipe: str, inputs: Mapping[str, str]) -> bool:
    """Is the entry in `dvc.lock` one of this command, these inputs (stage -> hash) and the recipe as it is now?"""
    recipe_file = RECIPE_FOLDER / f"{recipe}.yaml"
    content = _yaml().load(recipe_file)
    return bool(
        entry.get("cmd") == stage_command(stage, recipe)
        and {dep["path"]: dep.get("md5") for dep in entry.get("deps", [])}
        == {artifact_folder(name, recipe).as_posix(): md5 for name, md5 in inputs.items()}
        and entry.get("params", {}).get(recipe_file.as_posix()) == {name: content.get(name) for name in stage.sections}
    )


def is_committed(stage: Stage, recipe: str, artifact: Artifact) -> bool:
    """Does `dvc.lock` record this artefact, made by this command from these inputs and parameters?"""
    entry = lock_entry(stage, recipe)
    return (
        entry is not None
        and recorded_outputs(entry) == {artifact.path.as_posix(): artifact.hash}
        and has_provenance(entry, stage, recipe, artifact.manifest.inputs)
    )


def _yaml() -> YAML:
    """DVC's own reader: PyYAML takes 1e-3 for a string."""
    return YAML(typ="safe")


def commit(stage: Stage, recipe: str, *, rebuilt: bool, artifact: Artifact) -> bool:
    """Record a materialised artefact in DVC; True where there was something to record.

    Inside `dvc repro` nothing is to be done: DVC records the stage itself when its command ends.

    Raises:
        UserError: DVC refuses; its reason is in the message.
    """
    if "DVC_STAGE" in os.environ:
        return False
    if not rebuilt and is_committed(stage, recipe, artifact):
        return False
    address = stage_address(stage, recipe)
    told = False
    while True:
        held = _held_files()
        done = _run_dvc("commit", "-f", address)
        if done.returncode == 0:
            return True
        reason = " ".join((done.stderr or done.stdout).split())
        if not any(sign in reason for sign in BUSY):
            raise UserError(f"dvc could not commit {address}: {reason}")
        blockers = [int(pid) for pid in re.findall(r"\(PID (\d+)\)", reason)]
        if not told:
            by = f" (process {', '.join(map(str, blockers))})" if blockers else ""
            log.info("%s: another DVC command%s works on the same files, waiting for it to end", address, by)
            told = True
        _wait_for_dvc(held, blockers)


def _run_dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `dvc` to its end, out of reach of a terminal's Ctrl-C: it writes `dvc.lock` in place."""
    with interrupts.held_back():
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)


def _held_files() -> bytes:
    """DVC's notes on which of its commands reads or writes which files."""
    return RWLOCK.read_bytes() if RWLOCK.is_file() else b""


def _wait_for_dvc(held: bytes, blockers: Sequence[int]) -> None:
    """Until the commands that hold files locked end, or let go of one; a look a second, at less than a `dvc commit` costs.

    Args:
        held: the notes of before.
        blockers: ids of processes; none where it is the whole project that was locked.
    """
    while True:
        time.sleep(POLL_SECONDS)
        with dvc_at_rest():
            now = _held_files()
        if now != held or not any(map(psutil.pid_exists, blockers)):
            return
