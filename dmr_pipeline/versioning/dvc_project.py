"""The way into the DVC project around the working directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dmr_pipeline.errors import UserError

if TYPE_CHECKING:
    from dvc.repo import Repo

SITE_CACHE = Path("data/scratch/.dvc")
"""As `core.site_cache_dir` of .dvc/config names it: where DVC keeps notes on files, which it unpickles. Its default is under
the system's temporary folder, writable to everyone."""


@contextmanager
def repository() -> Iterator["Repo"]:
    """The DVC project around the working directory. What DVC refuses meanwhile is a UserError."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    if Path(".dvc").is_dir():
        SITE_CACHE.mkdir(parents=True, exist_ok=True)
        SITE_CACHE.chmod(0o700)  # DVC opens what it makes there to everyone
    # A download of the repository without its history is as good a project.
    without_git = {"core": {"no_scm": True}} if not in_git() else None
    try:
        with Repo(config=without_git) as repo:
            yield repo
    except DvcException as error:
        raise _refused(error) from error


@contextmanager
def dvc_at_rest() -> Iterator[None]:
    """DVC's own lock on the project, waited for. Nothing else of DVC is loaded, which would take most commands' time.

    Raises:
        UserError: the working directory is no DVC project, or its configuration is malformed.
    """
    from dvc.config import Config
    from dvc.exceptions import DvcException
    from dvc.lock import make_lock

    folder = Path(".dvc").absolute()
    if not folder.is_dir():
        raise UserError(f"{folder.parent} is no DVC project, it has no .dvc: go to the project's folder")
    notes = folder / "tmp"
    notes.mkdir(exist_ok=True)
    try:
        hardlinks = Config(str(folder))["core"].get("hardlink_lock", False)
        with make_lock(str(notes / "lock"), tmp_dir=str(notes), hardlink_lock=hardlinks, wait=True):
            yield
    except DvcException as error:
        raise _refused(error) from error


def in_git() -> bool:
    """Is the working directory in a Git checkout?"""
    here = Path.cwd()
    return any((folder / ".git").exists() for folder in (here, *here.parents))


def _refused(error: Exception) -> UserError:
    return UserError(f"DVC: {' '.join(str(error).split())}")
