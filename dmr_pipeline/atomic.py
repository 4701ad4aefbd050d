"""A file that is replaced whole: a kill leaves the old one or the new one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` once the block is left without an error. For one writer at a time."""
    part = path.with_name(f".{path.name}.part")
    yield part
    part.replace(path)
