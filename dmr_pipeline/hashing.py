"""Hashes of files."""

import hashlib
from pathlib import Path


def file_md5(path: Path) -> str:
    """md5 of the content, in hexadecimal; the file is not held in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
