"""DVC's objects by hash: folders are brought back, or sent to a remote, whatever this clone's `dvc.lock` says.

DVC trusts what lies in its cache, and in a remote. Here each object is hashed before it is used. `dvc` is imported only
where objects are touched.
"""

import logging
import os
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmr_pipeline.artifacts import manifest
from dmr_pipeline.artifacts.folders import (
    DATA_ROOT,
    artifact_folder,
    locked,
    publish,
    published,
    recover,
    sidecar_path,
)
from dmr_pipeline.artifacts.full_disk import disk_full_is_user_error
from dmr_pipeline.artifacts.manifest import Artifact, hash_files, remedies, verify
from dmr_pipeline.artifacts.run_record import run_record_beside
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.errors import UserError
from dmr_pipeline.versioning import dvc_stages, lock_file
from dmr_pipeline.versioning.dvc_project import in_git, repository
from dmr_pipeline.versioning.lock_file import Entries

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.tree import Tree

log = logging.getLogger(__name__)


def restore(folder_hash: str, target: Path, remote: str | None = None) -> None:
    """Make `target` the folder of this hash, from DVC's cache or, where objects are missing there, from a remote.

    The folder appears whole, in place of the one that was there, or not at all. The record of the run that made the old
    folder goes with it. A damaged object is removed from the cache and fetched again.

    Args:
        folder_hash: DVC's directory hash, '<md5>.dir'.
        remote: name of a DVC remote; the default one where it is None.

    Raises:
        UserError: an object is neither in the cache nor in the remote, is damaged in the remote, or the disk is full.
    """
    with disk_full_is_user_error(target, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if target.is_dir() and manifest.folder_hash(hash_files(target)) == folder_hash:
                return
            with repository() as repo:
                _checkout(repo, _load(repo, folder_hash, remote), target)
    log.info("%s: restored %s", target, folder_hash)


def push(folder_hash: str, remote: str | None = None) -> int:
    """Put the objects of a folder into a remote, so that other machines can `restore` it.

    The folder's list goes last: where a list is in a remote, so are its files.

    Args:
        folder_hash: DVC's directory hash of a folder in DVC's cache.
        remote: name of a DVC remote; the default one where it is None.

    Returns:
        The number of objects that the remote lacked.

    Raises:
        UserError: there is no such remote, it cannot be written, or the cache lacks an object.
    """
    with repository() as repo:
        store = repo.cloud.get_remote_odb(remote, "push")
        tree = _load(repo, folder_hash, remote)
        return _send(repo.cache.local, store, _files(tree)) + _send(repo.cache.local, store, [folder_hash])


def recorded_hash(stage: Stage, recipe: str) -> str | None:
    """The hash that `dvc.lock` records of a stage's artifact; None where it has no entry."""
    entry = dvc_stages.lock_entry(stage, recipe)
    return None if entry is None else _output_hash(entry, stage, recipe)


def restore_recorded(stage: Stage, recipe: str, remote: str | None = None) -> None:
    """Make a stage's artifact the one that `dvc.lock` records, or Git's where it is one that Git carries.

    Args:
        remote: name of a DVC remote; the default one where it is None.

    Raises:
        UserError: there is no such artifact, or it cannot be had; the message says what can be done instead.
    """
    folder = artifact_folder(stage.name, recipe)
    if recipe in stage.committed_recipes:
        _restore_from_git(folder)
        return
    anew = f"make it with `dmr materialize {stage.name} --recipe {recipe} --force`"
    recorded = recorded_hash(stage, recipe)
    if stage.append_only:
        anew = (
            f"to give its history up, `rm -r {folder}`"
            + (", remove that entry of dvc.lock" if recorded else "")
            + (f" and `dmr materialize {stage.name} --recipe {recipe}`")
        )
    if recorded is None:
        raise UserError(f"{lock_file.LOCK_FILE} records no {stage.name} of {recipe}: {anew}")
    try:
        restore(recorded, folder, remote)
    except UserError as error:
        raise UserError(f"{error}; or {anew}") from error


def check(stage: Stage, recipe: str, artifact: Artifact) -> None:
    """Compare the artifact with what is recorded of it.

    Raises:
        UserError: the artifact is damaged (see `damage`).
    """
    problem = damage(stage, recipe, artifact, lock_file.read_entries())
    if problem is not None:
        raise UserError(problem)


def damage(stage: Stage, recipe: str, artifact: Artifact, entries: Entries) -> str | None:
    """Why a verified artifact is not one that was ever made, and what to do; None where all is well.

    A manifest describes all other files but not itself, so this is what guards it. An artifact is known by its hash: from
    `dvc.lock`, from the record of the run beside it, from DVC's cache, or as the one that Git has. It need not be that of
    `dvc.lock`: it may have been built a moment ago, or another commit is checked out.
    """
    entry = entries.get(dvc_stages.stage_address(stage, recipe))
    recorded = None if entry is None else _output_hash(entry, stage, recipe)
    run = run_record_beside(artifact.path)
    built = None if run is None else run.hash
    if artifact.hash in (recorded, built) or (recorded is None and built is None):
        return None
    if recipe in stage.committed_recipes and _is_gits(artifact.path):
        return None
    with repository() as repo:
        if repo.cache.local.exists(artifact.hash):
            return None
    expected = f"{lock_file.LOCK_FILE} records {recorded}" if recorded else f"its run record says {built}"
    return (
        f"{artifact.path} is {artifact.hash}, but {expected}: a file of it, perhaps its manifest, was changed, or came damaged"
        f" out of DVC's cache: {remedies(artifact.path)}"
    )


def ensure_history(
    stage: Stage, recipe: str, data_root: Path = DATA_ROOT, remote: str | None = None, *, force: bool = False
) -> str | None:
    """Restore the artifact of a stage that keeps its history where `dvc.lock` records one and its folder is missing, so that
    a clone never starts an empty history; also where it is damaged, if it is to be made again all the same. An entry that
    `dvc.lock` has lost counts.

    Returns:
        The recorded hash where it cannot be restored: the artifact may be made anew only if it comes out the same, as that of
        a history of one entry does.

    Raises:
        UserError: a damaged artifact cannot be restored.
    """
    if not stage.append_only:
        return None
    folder = artifact_folder(stage.name, recipe, data_root)
    recover(folder)
    entries = lock_file.read_entries()
    address = dvc_stages.stage_address(stage, recipe)
    lost = address not in entries
    entry = (lock_file.lost_entries(entries) if lost else entries).get(address)
    recorded = None if entry is None else _output_hash(entry, stage, recipe)
    if recorded is None:
        return None
    if folder.is_dir():
        if force and _is_damaged(stage, recipe, folder, entries):
            restore(recorded, folder, remote)
        return None
    try:
        restore(recorded, folder, remote)
    except UserError as error:
        log.warning("%s is missing and cannot be restored: %s", folder, error)
        return None if lost else recorded
    return None


def _is_damaged(stage: Stage, recipe: str, folder: Path, entries: Entries) -> bool:
    try:
        return damage(stage, recipe, verify(folder), entries) is not None
    except UserError:
        return True


def _output_hash(entry: Mapping[str, Any], stage: Stage, recipe: str) -> str | None:
    return dvc_stages.recorded_outputs(entry).get(artifact_folder(stage.name, recipe).as_posix())


def _is_gits(folder: Path) -> bool:
    """Is it, file by file, what Git's index has? Compared by content: Git itself trusts the files' times."""
    folder = Path(os.path.relpath(folder))  # as Git names what it lists
    listed = _git("ls-files", "--stage", "-z", "--", str(folder))
    staged = {}
    for line in filter(None, listed.split("\0")):
        described, _, path = line.partition("\t")
        staged[path] = described.split()[1]
    paths = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    if not staged or sorted(staged) != paths:
        return False
    return _git("hash-object", "--", *paths).split() == [staged[path] for path in paths]


def _restore_from_git(folder: Path) -> None:
    """The folder appears whole, in place of the one that was there, or not at all."""
    names = _git("ls-files", "-z", "--", str(folder))
    if not names:
        anew = f"`dmr materialize {folder.name} --recipe {folder.parent.name} --force`"
        raise UserError(f"Git has no {folder}: make it with {anew}")
    with disk_full_is_user_error(folder, folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".restored-") as scratch:
            prefix = f"{Path(scratch).resolve()}/"
            _git("checkout-index", "-z", "--stdin", f"--prefix={prefix}", stdin=names)
            publish(Path(scratch, _git("rev-parse", "--show-prefix").strip(), folder), folder)


def _git(*arguments: str, stdin: str | None = None) -> str:
    """What Git prints; nothing where this is no checkout.

    Raises:
        UserError: it refuses.
    """
    if not in_git():
        return ""
    try:
        done = subprocess.run(["git", *arguments], input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("git is not installed, and has the artifact") from error
    if done.returncode != 0:
        raise UserError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def _load(repo: "Repo", folder_hash: str, remote: str | None) -> "Tree":
    """The list of a folder's files, once all its objects are in the cache and valid."""
    _fetch(repo, [folder_hash], remote)
    tree = _tree(repo.cache.local, folder_hash)
    _fetch(repo, _files(tree), remote)
    return tree


def _fetch(repo: "Repo", oids: Collection[str], remote: str | None) -> None:
    """Fetch from the remote what the cache lacks."""
    cache = repo.cache.local
    damaged = dvc_stages.drop_damaged(cache, oids)
    missing = {oid for oid in oids if not cache.exists(oid)}
    name = remote or repo.config["core"].get("remote")
    if missing and name:
        store = repo.cloud.get_remote_odb(name, "fetch")
        with _remote_errors(store):
            found = store.oids_exist(missing)
            _copy(store, cache, found)
        for oid in dvc_stages.drop_damaged(cache, found):
            raise UserError(
                f"{store.fs.unstrip_protocol(store.oid_to_path(oid))} in the DVC remote {name!r} is damaged, its content is"
                " not what its name says: remove it, and push it again from a clone that has it"
            )
        missing.difference_update(found)
    if missing:
        oid = min(missing)
        cached = "was damaged in DVC's cache and is removed from it" if oid in damaged else "is not in DVC's cache"
        raise UserError(
            f"DVC's object {oid} {cached}, and {f'the remote {name!r} lacks it' if name else 'there is no remote'}: push it"
            " from a clone that has it"
        )


def _send(cache: "HashFileDB", store: "HashFileDB", oids: Collection[str]) -> int:
    with _remote_errors(store):
        lacking = set(oids).difference(store.oids_exist(oids))
        _copy(cache, store, lacking)
    return len(lacking)


def _copy(source: "HashFileDB", destination: "HashFileDB", oids: Collection[str]) -> None:
    if oids:
        destination.add([source.oid_to_path(oid) for oid in oids], source.fs, list(oids), check_exists=False)


@contextmanager
def _remote_errors(store: "HashFileDB") -> Iterator[None]:
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise  # worth another try, and no user's to mend
    except OSError as error:
        raise UserError(f"the DVC remote at {store.fs.unstrip_protocol(store.path)} failed: {error}") from error


def _tree(cache: "HashFileDB", folder_hash: str) -> "Tree":
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    return Tree.load(cache, HashInfo("md5", folder_hash))


def _files(tree: "Tree") -> list[str]:
    """Names of the files' objects; files of equal content share one."""
    return sorted({info.value for _, _, info in tree})


def _checkout(repo: "Repo", tree: "Tree", target: Path) -> None:
    from dvc.fs import localfs
    from dvc_data.hashfile.checkout import checkout

    with published(target) as folder:
        checkout(str(folder.absolute()), localfs, tree, repo.cache.local)
        sidecar_path(target).unlink(missing_ok=True)
