"""Files from the network: whole and checked, or not there. A download that was cut goes on where it stopped."""

import base64
import errno
import hashlib
import re
import shutil
from pathlib import Path

import requests
from filelock import FileLock, Timeout
from pydantic import BaseModel
from requests.adapters import HTTPAdapter
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from urllib3.util import Retry

from dmr_pipeline.errors import UserError
from dmr_pipeline.progress import Bars

RETRIES = Retry(
    total=4, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), respect_retry_after_header=False
)
"""Of the request, not of the file. A server that asks to come back in an hour must not look like one that hangs."""
TIMEOUT_S = (15, 60)
"""To connect, and from one piece to the next."""
CHUNK_BYTES = 1 << 16
_AGAIN = "run the same command again to resume"


class _Source(BaseModel):
    """Where a `.part` comes from; beside it while it grows. A `.part` without this is not resumed."""

    url: str
    version: str
    """The server's ETag, or date of last change: pieces of two versions must not be joined."""
    md5: str | None
    """Of the whole file, in base64, where the server says it."""


def download(url: str, path: Path, sha256: str | None = None) -> str:
    """Fetch `url` to `path`. A file that lies there already got its name only after the checks, and is kept.

    What arrives is in `<path>.part` until it is whole; a second call with the same URL resumes it.

    Args:
        sha256: what the file must have, in hexadecimal.

    Returns:
        The sha256 of the file.

    Raises:
        UserError: the server does not answer or refuses, the connection is cut, the disk is full, the checksum is
            another one than the caller's or the server's, or another process downloads the same file.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"{sha256!r} is not a sha256: that has 64 hexadecimal digits")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            if path.exists():
                return _checked(path, url, sha256, md5=None)
            part, record = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
            md5 = _fetch(url, part, record)
            found = _checked(part, url, sha256, md5)
            part.replace(path)
            record.unlink()
            return found
    except Timeout as error:
        raise UserError(f"{path}: another process downloads it: wait until it is done") from error


def _fetch(url: str, part: Path, record: Path) -> str | None:
    """Complete `part`. Returns the MD5 that the server gives."""
    source = _resumable(url, part, record)
    offset = part.stat().st_size if source else 0
    try:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=RETRIES))
            response = _get(session, url, offset)
            if source and response.headers.get("Content-Range") == f"bytes */{offset}":  # 416: nothing is missing
                return source.md5
            if source and not _continues(response, source, offset):
                source, offset = None, 0
                if response.status_code != requests.codes.ok:
                    response = _get(session, url, 0)
            if not response.ok:
                raise UserError(f"{url}: the server answers {response.status_code} {response.reason}")
            if source is None:
                record.unlink(missing_ok=True)
                part.write_bytes(b"")
                source = _Source(url=url, version=_version(response), md5=response.headers.get("Content-MD5"))
                record.write_text(source.model_dump_json(), encoding="utf-8")
            _append(response, url, part, offset)
    except requests.RequestException as error:
        raise UserError(f"{url}: no answer ({error}): check the address and the network, and {_AGAIN}") from error
    return source.md5


def _resumable(url: str, part: Path, record: Path) -> _Source | None:
    try:
        source = _Source.model_validate_json(record.read_bytes())
        usable = source.url == url and source.version and part.stat().st_size > 0
    except (FileNotFoundError, ValueError):
        return None
    return source if usable else None


def _get(session: requests.Session, url: str, offset: int) -> requests.Response:
    headers = {"Accept-Encoding": "identity"}  # lengths and checksums are then those of the file
    if offset:
        headers["Range"] = f"bytes={offset}-"
    return session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S)


def _version(response: requests.Response) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _continues(response: requests.Response, source: _Source, offset: int) -> bool:
    return (
        response.status_code == requests.codes.partial_content
        and response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        and _version(response) == source.version
    )


def _append(response: requests.Response, url: str, part: Path, offset: int) -> None:
    """Write what the server sends behind what is there.

    Raises:
        UserError: the connection is cut or the disk is full; what has arrived stays in `part`.
    """
    length = response.headers.get("Content-Length")
    size = None if length is None else offset + int(length)
    if size is not None and size - offset > shutil.disk_usage(part.parent).free:
        raise _no_space(part, size)
    cut: requests.RequestException | None = None
    try:
        with part.open("ab") as file, _progress_bar() as progress:
            task = progress.add_task(url.rsplit("/", 1)[-1], total=size, completed=offset)
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                progress.advance(task, len(chunk))
    except requests.RequestException as error:
        cut = error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(part, size) from error
        raise
    arrived = part.stat().st_size
    if cut or size not in (None, arrived):
        total = "" if size is None else f" of {size:,}"
        raise UserError(f"{url}: the connection was cut after {arrived:,}{total} bytes: {_AGAIN}") from cut


def _progress_bar() -> Progress:
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )


def _no_space(part: Path, size: int | None) -> UserError:
    missing = "" if size is None else f"{(size - part.stat().st_size) / 1e6:,.1f} MB are still missing, "
    free = shutil.disk_usage(part.parent).free / 1e6
    return UserError(f"no space left for {part}: {missing}{free:,.1f} MB are free: make room and {_AGAIN}")


def _checked(file: Path, url: str, sha256: str | None, md5: str | None) -> str:
    """The file's sha256.

    Args:
        md5: in base64.

    Raises:
        UserError: a checksum that is given is another one; the file is deleted.
    """
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
        content.seek(0)
        found_md5 = base64.b64encode(hashlib.file_digest(content, "md5").digest()).decode() if md5 else None
    for kind, has, wanted in (("sha256", found, sha256 and sha256.lower()), ("MD5", found_md5, md5)):
        if wanted not in (None, has):
            file.unlink()
            raise UserError(
                f"{url}: its {kind} is {has}, it should be {wanted}: "
                "the file was deleted, run the same command again to download it anew"
            )
    return found
