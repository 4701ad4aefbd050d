"""`dvc.lock`: written whole or not at all, read with care, and a copy of it kept.

DVC itself writes it in place, so that a kill of `dvc repro` or `dvc commit` may leave a part of it, which may even be valid
YAML. The copy tells what it had.
"""

import functools
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dmr_pipeline.atomic import replaced
from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.versioning.dvc_project import dvc_at_rest

LOCK_FILE = Path("dvc.lock")
COPY = Path(".dvc/tmp/dvc.lock.copy")

Entries = Mapping[str, Mapping[str, Any]]
"""Address of a stage -> what was recorded of it."""


class _Item(BaseModel):
    """A dependency or an output. DVC may note more of it than what is read here."""

    model_config = ConfigDict(defer_build=True)

    path: str
    hash: Literal["md5"] = "md5"
    md5: str | None = None


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)

    cmd: str | list[str]
    deps: list[_Item] = []
    params: dict[str, dict[str, object]] = {}
    outs: list[_Item] = []


class _Lock(BaseModel):
    """The file as DVC writes it. DVC's own schema comes with all of DVC, which takes longer to import than the file to read."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    version: Literal["2.0"] = Field(alias="schema")
    stages: dict[str, _Entry] = {}
    datasets: object = None


def read_entries() -> Entries:
    """What `dvc.lock` records; nothing where there is none.

    Raises:
        UserError: it is unreadable; the message has the command that mends it.
    """
    if not LOCK_FILE.is_file():
        return {}
    with dvc_at_rest():
        return check_and_copy()


def check_and_copy() -> Entries:
    """As `read_entries`, for who holds DVC's lock. A copy is kept, unless the file lacks entries that the last copy has and
    is not what Git has: then those may have been lost."""
    if not LOCK_FILE.is_file():
        return {}
    content = LOCK_FILE.read_bytes()
    try:
        entries = parse(content)
    except ValueError as error:
        raise UserError(f"{LOCK_FILE} {error}: mend it with {_remedy()}, then run again") from error
    is_new = not COPY.is_file() or content != COPY.read_bytes()
    if is_new and not lost_entries(entries):
        _replace(COPY, content)
    return entries


def lost_entries(entries: Entries) -> Entries:
    """What the last good `dvc.lock` of this clone had and this one lacks, unless Git has it just so."""
    copied = _copied()
    lost = {address: copied[address] for address in copied.keys() - entries.keys()}
    return {} if not lost or _git_has_it_so() else lost


def parse(content: bytes) -> Entries:
    """The entries of the file's stages.

    Raises:
        ValueError: why it is no `dvc.lock`, in a few words that follow its name.
    """
    entries: Entries = _load(content).get("stages", {})
    return entries


@functools.lru_cache(maxsize=4)  # a run asks several times at each stage, and the file is seldom another one
def _load(content: bytes) -> Mapping[str, Any]:
    """As `parse`, all of it."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("is damaged, no text") from error
    if not text.strip():
        raise ValueError("is empty, as a DVC that is killed leaves it")
    if any(line.startswith(("<<<<<<<", ">>>>>>>")) for line in text.splitlines()):
        raise ValueError("holds Git's conflict markers")
    try:
        loaded = YAML(typ="safe").load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ValueError("is not valid YAML, cut or changed") from error
    try:
        _Lock.model_validate(loaded)
    except ValidationError as error:
        raise ValueError(f"is not as DVC writes it ({problems_of(error)[0]})") from error
    whole: Mapping[str, Any] = loaded
    return whole


def record(address: str, entry: Mapping[str, Any]) -> None:
    """Put a stage's entry into the file. For who holds DVC's lock, and has read the file."""
    from dvc.utils.serialize import dumps_yaml

    before: Mapping[str, Any] = _load(LOCK_FILE.read_bytes()) if LOCK_FILE.is_file() else {"schema": "2.0"}
    after = {**before, "stages": {**before.get("stages", {}), address: entry}}
    _replace(LOCK_FILE, dumps_yaml(after).encode())
    check_and_copy()


def _copied() -> Entries:
    try:
        return parse(COPY.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _remedy() -> str:
    """What is recorded after that is what the artifacts on the disk are, so that none of these loses work."""
    if _copied():
        return f"`cp {COPY} {LOCK_FILE}`"
    if _in_head():
        return f"`git checkout HEAD -- {LOCK_FILE}`"
    return f"`rm {LOCK_FILE}`"


def _git_has_it_so() -> bool:
    return _in_head() and _run("diff", "--quiet", "HEAD", "--", str(LOCK_FILE))


def _in_head() -> bool:
    return _run("cat-file", "-e", f"HEAD:./{LOCK_FILE}")


def _run(*git: str) -> bool:
    """Does Git say yes?"""
    try:
        return subprocess.run(["git", *git], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _replace(path: Path, content: bytes) -> None:
    with replaced(path) as part, part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
