"""Which router decides: that of a release of the recipe, or one in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmr_pipeline.artifacts.folders import DATA_ROOT, artifact_folder
from dmr_pipeline.artifacts.manifest import MANIFEST, verify
from dmr_pipeline.errors import UserError
from dmr_pipeline.release.history import read_releases
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import Router, load_router

STAGE = "released_router"


def released(recipe: str, data_root: Path = DATA_ROOT) -> tuple[Path, int]:
    """Folder of the router in use, and the number of its release.

    Raises:
        UserError: nothing is released, or the artifact is damaged.
    """
    folder = verify(artifact_folder(STAGE, recipe, data_root)).path
    return folder / ROUTER_FOLDER, read_releases(folder).current


def mark_of_release(recipe: str, data_root: Path = DATA_ROOT) -> tuple[int, int] | None:
    """Changes when another router is released, without reading it; None while there is none."""
    try:
        found = (artifact_folder(STAGE, recipe, data_root) / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def earlier(recipe: str, number: int, data_root: Path = DATA_ROOT) -> Iterator[Path]:
    """Folder of the router of a release, for as long as needed: from the artifact in use, or from DVC's cache or remote.

    Raises:
        UserError: there is no such release, or its files cannot be had.
    """
    folder = verify(artifact_folder(STAGE, recipe, data_root)).path
    history = read_releases(folder)
    releases = {decision.number: decision.router for decision in history.decisions if decision.releases}
    if number not in releases:
        known = ", ".join(map(str, releases))
        raise UserError(f"there is no release {number} of {recipe} (releases: {known}): see `dmr router history`")
    if releases[number] == releases[history.current]:
        yield folder / ROUTER_FOLDER
        return
    from dmr_pipeline.versioning.trained_routers import trained_router

    with trained_router(recipe, releases[number], data_root) as artifact:
        yield artifact / ROUTER_FOLDER


def load(folder: Path, rollouts: Rollouts) -> Router:
    """A router that decides between these rungs.

    Raises:
        UserError: it cannot be loaded, or was trained for other rungs.
    """
    router = load_router(folder, rollouts.device, rollouts.acting.models[rollouts.acting.cheapest])
    if router.settings.route != tuple(rollouts.route):
        raise UserError(
            f"router {folder} chooses from {', '.join(router.settings.route)}, but the recipe routes between"
            f" {', '.join(rollouts.route)}: train it again, or name the router of this ladder"
        )
    return router


def numbers(recipe: str, data_root: Path = DATA_ROOT) -> list[int]:
    """Of all releases, the earliest first; none before the first one."""
    folder = artifact_folder(STAGE, recipe, data_root)
    if not folder.is_dir():
        return []
    return [decision.number for decision in read_releases(folder).decisions if decision.releases]
