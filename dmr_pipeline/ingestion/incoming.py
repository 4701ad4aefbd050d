"""`data/incoming/<recipe>/`: what was dropped there, and how it is moved away.

Anything may lie there, from anyone. Only regular files are opened, and none of more than `FILE_LIMIT` bytes; the rest is moved
by name alone, or left where it lies and named. A file moves once: a bad one into `quarantine/`, the reasons beside it; a good
one into `ingested/`.
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmr_pipeline.atomic import replaced
from dmr_pipeline.errors import UserError, printable

INGESTED_FOLDER = "ingested"
QUARANTINE_FOLDER = "quarantine"
FILE_LIMIT = 64 << 20
"""Bytes that a file may have, and what it holds once it is unpacked. It is read whole, and episodes of many short steps take 15
times as much memory: half of the 2 GB that the stage asks its machine for."""
_NAME_BYTES = 200
"""File systems allow 255; the rest is for what is put before and behind a name."""
_KINDS = {
    stat.S_IFLNK: "a link, and links are not followed: drop the file itself",
    stat.S_IFIFO: "a named pipe, no file",
    stat.S_IFSOCK: "a socket, no file",
    stat.S_IFCHR: "a device, no file",
    stat.S_IFBLK: "a device, no file",
}


@dataclass(frozen=True)
class Dropped:
    """A thing that was dropped and can be moved by its name."""

    path: Path
    digest: str
    """sha256 of its content; of what is known of it from outside, where it is not read."""
    refusal: str | None
    """Why it is not read."""


def look(incoming: Path) -> tuple[list[Dropped], list[str]]:
    """What lies directly in the folder, sorted by name, but hidden files and `*.part`; and what must be left there, each with the
    reason and what to do. The folder need not exist."""
    try:
        paths = sorted(incoming.iterdir())
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{printable(incoming)} cannot be read ({error.strerror}): give this user the right to, or mend it"]
    dropped, left = [], []
    for path in paths:
        if path.name.startswith(".") or path.suffix == ".part":
            continue
        try:
            if path.name not in (INGESTED_FOLDER, QUARANTINE_FOLDER) or not path.is_dir():
                dropped.append(_look_at(path))
        except FileNotFoundError:
            continue  # another process has moved it meanwhile
        except UserError as error:
            left.append(f"{printable(path)}: {error}")
        except OSError as error:
            left.append(f"{printable(path)}: it cannot be looked at ({error.strerror}): mend it, or move it away")
    return dropped, left


def _look_at(path: Path) -> Dropped:
    """What lies there.

    Raises:
        UserError: it has to stay where it is; why, and what to do.
        OSError: nothing can be said of it.
    """
    found = path.lstat()
    kind = stat.S_IFMT(found.st_mode)
    if stat.S_ISDIR(kind):
        raise UserError("it is a folder, no file: drop the files in it, and move it away")
    seen = f"{kind} {path.name} {found.st_size} {found.st_mtime_ns}"
    unread = hashlib.sha256(seen.encode(errors="surrogateescape")).hexdigest()
    if not stat.S_ISREG(kind):
        return Dropped(path, unread, f"it is {_KINDS.get(kind, 'no file')}")
    if found.st_size > FILE_LIMIT:
        return Dropped(path, unread, _too_large(found.st_size))
    return Dropped(path, hashlib.sha256(read(path)).hexdigest(), None)


def _too_large(size: int) -> str:
    return f"it has {size:,} bytes, but a file is read whole and may have {FILE_LIMIT:,}: split it"


def read(path: Path) -> bytes:
    """The content of a regular file; nothing else is waited for or followed.

    Raises:
        FileNotFoundError: it is gone.
        UserError: it is no regular file, too large, or may not be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UserError("it is no file any more")
            content = file.read(FILE_LIMIT + 1)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise UserError("it may not be read: give this user the right to, or move it away") from error
    except OSError as error:
        raise UserError(f"it cannot be read ({error.strerror}): mend it, or move it away") from error
    if len(content) > FILE_LIMIT:
        raise UserError(_too_large(len(content)))
    return content


def make_way(incoming: Path) -> None:
    """A dropped thing that is called as one of our folders gets another name, under which it is then taken for what it is."""
    for name in (INGESTED_FOLDER, QUARANTINE_FOLDER):
        path = incoming / name
        number = 0
        if os.path.lexists(path) and not path.is_dir():
            while os.path.lexists(other := incoming / f"{name}.{number}"):
                number += 1
            path.rename(other)


def quarantine(file: Dropped, problems: Sequence[str]) -> Path:
    """Move it, and write the reasons beside it, in full. They come first, so that no file ever lies there without.

    Returns:
        The file of reasons.

    Raises:
        OSError: it cannot be moved, or the reasons cannot be written.
    """
    folder = file.path.parent / QUARANTINE_FOLDER
    folder.mkdir(exist_ok=True)
    reason = folder / f"{_filed_name(file)}.reason.txt"
    with replaced(reason) as part:
        part.write_text("".join(f"{printable(problem)}\n" for problem in problems), encoding="utf-8")
    try:
        move(file, folder)
    except OSError:
        reason.unlink()
        raise
    return reason


def move(file: Dropped, folder: Path) -> None:
    """Into a folder that may be on another file system. Any number of processes may do so at once.

    Raises:
        OSError: it cannot be moved.
    """
    folder.mkdir(exist_ok=True)
    target = folder / _filed_name(file)
    try:
        try:
            file.path.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_over(file.path, target)
    except FileNotFoundError:
        if os.path.lexists(file.path):
            raise
        # Another process has moved it meanwhile.


def _copy_over(path: Path, target: Path) -> None:
    """A kill leaves the file in one of the two places, or in both."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(path, part, follow_symlinks=False)
        if not part.is_symlink():
            with part.open("rb+") as copied:
                os.fsync(copied.fileno())
        part.replace(target)
        path.unlink()
    finally:
        part.unlink(missing_ok=True)


def _filed_name(file: Dropped) -> str:
    name = printable(file.path.name)
    if len(name.encode()) > _NAME_BYTES:
        suffix = printable(file.path.suffix)[-10:]
        name = name.encode()[: _NAME_BYTES - len(suffix.encode())].decode(errors="ignore") + suffix
    return f"{file.digest[:12]}-{name}"
