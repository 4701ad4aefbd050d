"""DVC's objects by hash: folders are brought back, or sent to a remote, whatever this clone's `dvc.lock` says.

DVC trusts what lies in its cache, and in a remote. Here each object is hashed before it is used. `dvc` is imported only
where objects are touched.
"""

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmr_pipeline import artifacts
from dmr_pipeline.artifacts import DATA_ROOT, Artifact, artifact_folder, file_md5, hash_files
from dmr_pipeline.errors import UserError
from dmr_pipeline.stage import Stage
from dmr_pipeline.versioning import dvc_stages

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
    with artifacts.disk_full_is_user_error(target, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with artifacts.locked(target):
            if target.is_dir() and artifacts.folder_hash(hash_files(target)) == folder_hash:
                return
            with dvc_stages.repository() as repo:
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
    with dvc_stages.repository() as repo:
        store = repo.cloud.get_remote_odb(remote, "push")
        tree = _load(repo, folder_hash, remote)
        return _send(repo.cache.local, store, _files(tree)) + _send(repo.cache.local, store, [folder_hash])


def recorded_hash(stage: Stage, recipe: str) -> str | None:
    """The hash that `dvc.lock` records of a stage's artefact; None where it has no entry."""
    entry = dvc_stages.lock_entry(stage, recipe)
    return None if entry is None else _output_hash(entry, stage, recipe)


def check_recorded(stage: Stage, recipe: str, artifact: Artifact) -> None:
    """Is a stage's artefact the one that `dvc.lock` records of the same command, inputs and parameters?

    A manifest describes all other files but not itself, so this is what guards it. Meant for the inputs of a stage before
    it runs. Not for an artefact that was restored by a hash from elsewhere: that hash vouches for it, and the `dvc.lock` of
    this clone may be older.

    Raises:
        UserError: it is another one: some file of it was changed, or came damaged out of the cache. A damaged object is
            removed from the cache, since DVC would use it again.
    """
    entry = dvc_stages.lock_entry(stage, recipe)
    recorded = None if entry is None else _output_hash(entry, stage, recipe)
    if entry is None or recorded is None or recorded == artifact.hash:
        return
    if not dvc_stages.has_provenance(entry, stage, recipe, artifact.manifest.inputs):
        return
    if stage.committed:
        recorded_one = f"`git checkout -- {artifact.path}`"
    else:
        # `dvc checkout` alone believes its notes on the files, which say that they are the recorded ones.
        recorded_one = f"`rm -r {artifact.path}` and `dvc pull {dvc_stages.stage_address(stage, recipe)}`"
        with dvc_stages.repository() as repo:
            _drop_damaged(repo.cache.local, [recorded])
            if repo.cache.local.exists(recorded):
                _drop_damaged(repo.cache.local, _files(_tree(repo.cache.local, recorded)))
    raise UserError(
        f"{artifact.path} is {artifact.hash}, but {dvc_stages.LOCK_FILE} records {recorded} of the same inputs: a file of it,"
        f" perhaps its manifest, was changed, or came damaged out of DVC's cache: get the recorded one with {recorded_one},"
        f" or make it again with `dmr materialize {stage.name} --recipe {recipe} --force`"
    )


def ensure_history(stage: Stage, recipe: str, data_root: Path = DATA_ROOT, remote: str | None = None) -> str | None:
    """Restore the artefact of a stage that keeps its history where `dvc.lock` records one and its folder is missing, so that
    a clone never starts an empty history.

    Returns:
        The recorded hash where it cannot be restored: the artefact may be made anew only if it comes out the same, as that of
        a history of one entry does.
    """
    folder = artifact_folder(stage.name, recipe, data_root)
    artifacts.recover(folder)
    recorded = recorded_hash(stage, recipe)
    if not stage.keeps_history or recorded is None or folder.is_dir():
        return None
    try:
        restore(recorded, folder, remote)
    except UserError as error:
        log.warning("%s is missing and cannot be restored: %s", folder, error)
        return recorded
    return None


def _output_hash(entry: Mapping[str, Any], stage: Stage, recipe: str) -> str | None:
    return dvc_stages.recorded_outputs(entry).get(artifact_folder(stage.name, recipe).as_posix())


def _load(repo: "Repo", folder_hash: str, remote: str | None) -> "Tree":
    """The list of a folder's files, once all its objects are in the cache and valid."""
    _fetch(repo, [folder_hash], remote)
    tree = _tree(repo.cache.local, folder_hash)
    _fetch(repo, _files(tree), remote)
    return tree


def _fetch(repo: "Repo", oids: Collection[str], remote: str | None) -> None:
    """Fetch from the remote what the cache lacks."""
    cache = repo.cache.local
    damaged = _drop_damaged(cache, oids)
    missing = {oid for oid in oids if not cache.exists(oid)}
    name = remote or repo.config["core"].get("remote")
    if missing and name:
        store = repo.cloud.get_remote_odb(name, "fetch")
        with _remote_errors(store):
            found = store.oids_exist(missing)
            _copy(store, cache, found)
        for oid in _drop_damaged(cache, found):
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
            " from a clone that has it, or make the artefact again; one that lies in Git is in no cache, `git checkout` has it"
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


def _drop_damaged(cache: "HashFileDB", oids: Collection[str]) -> list[str]:
    """Remove the objects whose content is not what their name says, since DVC itself looks only at their file mode."""
    damaged = [
        oid for oid in oids if cache.exists(oid) and file_md5(Path(cache.oid_to_path(oid))) != oid.removesuffix(".dir")
    ]
    for oid in damaged:
        log.warning("DVC's object %s is damaged and is removed", cache.oid_to_path(oid))
        cache.delete(oid)
    return damaged


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

    folder = artifacts.new_folder(target)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        checkout(str(folder.absolute()), localfs, tree, repo.cache.local)
        artifacts.sidecar_path(target).unlink(missing_ok=True)
        artifacts.publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
