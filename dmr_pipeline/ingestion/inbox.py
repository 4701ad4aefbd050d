"""Episodes that an agent logged at work, dropped as files into `data/incoming/<recipe>/`.

A file is known by its content (sha256), never by its name or time, and is taken in whole or not at all. It moves once: a bad
one into `quarantine/`, the reasons beside it; a good one into `ingested/`, after the artifact that holds it was published. So a
kill at any moment loses no file, and no content is taken in twice. What cannot be moved stops nothing: `dmr status` names it.
"""

import hashlib
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from dmr_pipeline.artifacts.folders import artifact_folder, incoming_folder
from dmr_pipeline.artifacts.run_record import run_record_beside
from dmr_pipeline.errors import FULL, UserError, printable
from dmr_pipeline.ingestion.incoming import (
    INGESTED_FOLDER,
    QUARANTINE_FOLDER,
    Dropped,
    look,
    make_way,
    move,
    quarantine,
    read,
)
from dmr_pipeline.ingestion.rules import Rules, read_episodes
from dmr_pipeline.ingestion.schema import LoggedEpisode
from dmr_pipeline.ingestion.stored import (
    STAGE,
    stored_files,
)

log = logging.getLogger(__name__)

NOT_MOVED = "not_moved"
"""In the run's record: sha256 of a refused file that could not be moved -> why, and why it was refused."""


def dropped_files(incoming: Path) -> list[Dropped]:
    make_way(incoming)
    dropped, left = look(incoming)
    for reason in left:
        log.warning("%s", reason)
    return dropped


def read_dropped(file: Dropped, rules: Rules, earlier: Collection[str]) -> tuple[list[LoggedEpisode], list[str]]:
    """As `read_episodes`; nothing of either where the file is gone, or is being written."""
    if file.refusal is not None:
        return [], [f"{file.path.name}: {file.refusal}"]
    try:
        content = read(file.path)
    except FileNotFoundError:
        return [], []
    except UserError as error:
        log.warning("%s: %s", printable(file.path), error)
        return [], []
    if hashlib.sha256(content).hexdigest() != file.digest:
        log.warning("%s is being written: left for the next time", printable(file.path))
        return [], []
    return read_episodes(file.path, content, rules, earlier)


def put_in_quarantine(file: Dropped, problems: Sequence[str]) -> str | None:
    """Why the file cannot be moved, in a few words; None where it was.

    Raises:
        OSError: the disk is full.
    """
    try:
        reasons = quarantine(file, problems)
    except OSError as error:
        if error.errno in FULL:
            raise
        trouble = f"it cannot be moved into {QUARANTINE_FOLDER}/ ({error.strerror or printable(error)})"
        log.warning("%s: %s; it was refused: %s", printable(file.path), trouble, shortened(problems))
        return trouble
    more = f" (and {len(problems) - 1} more, see {printable(reasons)})" if len(problems) > 1 else ""
    log.warning("%s: quarantined: %s%s", printable(file.path), printable(problems[0]), more)
    return None


def shortened(problems: Sequence[str]) -> str:
    return printable(problems[0]) + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def waiting_files(data_root: Path, recipe: str) -> Sequence[Path]:
    """Dropped files that are yet to be taken in or quarantined, sorted by name."""
    return [file.path for file in _waiting(data_root, recipe)]


def waiting_contents(data_root: Path, recipe: str) -> str | None:
    """sha256 over the waiting files' contents, whatever they are called; None where none is waiting."""
    digests = sorted(file.digest for file in _waiting(data_root, recipe))
    return hashlib.sha256("".join([recipe, *digests]).encode()).hexdigest() if digests else None


def _waiting(data_root: Path, recipe: str) -> list[Dropped]:
    settled = _held(data_root, recipe) | _not_moved(data_root, recipe).keys()
    dropped, _ = look(incoming_folder(recipe, data_root))
    return [file for file in dropped if file.digest not in settled]


def archive(data_root: Path, recipe: str) -> None:
    """Move dropped files that the published artifact holds into `ingested/`. Any number of processes may do so at once."""
    held = _held(data_root, recipe)
    dropped, _ = look(incoming_folder(recipe, data_root))
    for file in dropped:
        if file.digest in held:
            try:
                move(file, file.path.parent / INGESTED_FOLDER)
            except OSError as error:
                log.warning("%s: it is ingested, but cannot be moved away (%s)", printable(file.path), error.strerror)


def lying_files(data_root: Path, recipe: str) -> list[str]:
    """What lies in the recipe's folder and waits for nothing: what it is, and what to do, in a line each."""
    dropped, left = look(incoming_folder(recipe, data_root))
    held, not_moved = _held(data_root, recipe), _not_moved(data_root, recipe)
    again = f"or give this user the right to and run `dmr materialize {STAGE} --recipe {recipe} --force`"
    for file in dropped:
        if file.digest in held:
            left.append(f"{printable(file.path)}: it is ingested; `dmr run {recipe}` moves it into {INGESTED_FOLDER}/")
        elif file.digest in not_moved:
            left.append(f"{printable(file.path)}: {not_moved[file.digest]}; move it away, {again}")
    return left


def misplaced_files(data_root: Path, recipes: Sequence[str]) -> list[Path]:
    """Files under `data/incoming/` that no recipe will ever ingest, sorted: not directly in the folder of one."""
    root = incoming_folder("", data_root)
    return sorted(
        path
        for folder, _, names in os.walk(root)
        for path in (Path(folder, name) for name in names)
        if not path.name.startswith(".")
        and path.suffix != ".part"
        and not _has_its_place(path.relative_to(root).parts, recipes)
    )


def misplaced_lines(data_root: Path, recipes: Sequence[str]) -> list[str]:
    """What `misplaced_files` are, and what to do, in a line each."""
    right = incoming_folder("<recipe>", data_root)
    return [
        f"{printable(path)} is in no recipe's folder: move it to {right}/"
        for path in misplaced_files(data_root, recipes)
    ]


def _held(data_root: Path, recipe: str) -> set[str]:
    """sha256 of every dropped file that the published artifact holds."""
    return {path.stem for path in stored_files(artifact_folder(STAGE, recipe, data_root))}


def _not_moved(data_root: Path, recipe: str) -> dict[str, str]:
    """What the record of the run that made the artifact says of refused files that still lie where they were dropped."""
    try:
        record = run_record_beside(artifact_folder(STAGE, recipe, data_root))
    except OSError:
        return {}
    found = None if record is None else record.measured.get(NOT_MOVED)
    return {digest: str(why) for digest, why in found.items()} if isinstance(found, dict) else {}


def _has_its_place(parts: tuple[str, ...], recipes: Sequence[str]) -> bool:
    """Whether a file lies where a recipe's files lie.

    Args:
        parts: of a file's path under `data/incoming/`.
    """
    filed = (INGESTED_FOLDER, QUARANTINE_FOLDER)
    return parts[0] in recipes and (len(parts) == 2 or (len(parts) == 3 and parts[1] in filed))
