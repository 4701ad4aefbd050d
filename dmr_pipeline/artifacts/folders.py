"""Where artifacts lie, and how a folder is replaced whole: the new one is made beside it, and takes its place by renames, of
which a kill leaves none half done. One process at a time works on a folder."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

DATA_ROOT = Path("data")


def artifact_folder(stage: str, recipe: str, data_root: Path = DATA_ROOT) -> Path:
    return data_root / recipe / stage


def incoming_folder(recipe: str, data_root: Path = DATA_ROOT) -> Path:
    """Where people drop new trajectories for a recipe."""
    return data_root / "incoming" / recipe


def sidecar_path(folder: Path) -> Path:
    """The unhashed record of the run that made the artifact in `folder`."""
    return folder.with_name(f"{folder.name}.run.json")


def recover(folder: Path) -> None:
    """Put back the old artifact where a kill fell between the two renames of `publish`."""
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


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A new, empty folder that takes the place of `folder` once the block is left; nothing stays of it where the block
    raises. For who holds the lock of `folder`."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        publish(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def publish(output: Path, folder: Path) -> None:
    """Two renames, since no portable one replaces a folder that is not empty; `recover` mends a kill between them."""
    old = _old_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    output.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
