"""What an LLM that is brought along is read from: known without loading it, so that provenance can hash it."""

import hashlib
import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.hashing import file_md5

ADAPTER_CONFIG = "adapter_config.json"
MEMORY = Path("data/scratch/.pretrained.json")
"""File -> its size, time of change and hash, as `content_hash` last found them."""
_MEMORY = TypeAdapter(dict[str, tuple[int, int, str]], config=ConfigDict(defer_build=True))


class AdapterConfig(BaseModel):
    """What is read here of a PEFT adapter's config; PEFT reads the rest."""

    model_config = ConfigDict(defer_build=True)

    base_model_name_or_path: str | None = None
    """A folder, if relative then to the working directory, or a hub id."""
    revision: str | None = None
    """Of the base, where that is a hub id."""


def pretrained_paths(source: str | Path) -> list[Path]:
    """What an LLM that is brought along is read from here: its folder and, where that holds an adapter, its base's; or its file.

    Nothing for a hub id, which its commit hash pins.

    Raises:
        UserError: the adapter's config is unreadable.
    """
    folder = Path(source)
    if not folder.is_dir():
        return [folder] if folder.is_file() else []
    adapter = adapter_config(folder)
    base = adapter and adapter.base_model_name_or_path
    return [folder, Path(base)] if base and Path(base).is_dir() else [folder]


def adapter_config(folder: Path) -> AdapterConfig | None:
    """The config of the PEFT adapter in the folder; None where there is no adapter in it.

    Raises:
        UserError: the config is unreadable.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        return AdapterConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: not the config of an adapter: {problems_of(error)[0]}") from error


def content_hash(source: Path) -> str:
    """Of the names and contents of all files in the folder that are not hidden, or of the one file. A file of the same size and
    time of change as before is not read again: gigabytes are hashed once."""
    try:
        known = _MEMORY.validate_json(MEMORY.read_bytes())
    except (FileNotFoundError, ValidationError):
        known = {}
    found: dict[str, tuple[int, int, str]] = {}
    content: dict[str, str] = {}
    folder = source if source.is_dir() else source.parent
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        relpath = path.relative_to(folder)
        if any(part.startswith(".") for part in relpath.parts) or not path.is_file():
            continue
        stat, name = path.stat(), str(path.resolve())
        state, before = (stat.st_size, stat.st_mtime_ns), known.get(name)
        found[name] = before if before and before[:2] == state else (*state, file_md5(path))
        content[relpath.as_posix()] = found[name][2]
    if not found.items() <= known.items():
        MEMORY.parent.mkdir(parents=True, exist_ok=True)
        part = MEMORY.with_suffix(f".{os.getpid()}.part")  # others may be hashing too
        part.write_text(json.dumps({**known, **found}), encoding="utf-8")
        part.replace(MEMORY)
    return hashlib.md5(json.dumps(content, sort_keys=True).encode()).hexdigest()
