"""What an LLM that is brought along is read from: known without loading it, so that provenance can hash it."""

import hashlib
import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.hashing import file_md5
from dmr_pipeline.model_cache import identity

ADAPTER_CONFIG = "adapter_config.json"
MEMORY = Path("data/scratch/.pretrained.json")
"""File -> its size, time of change and hash, as `content_hash` last found them."""
_MEMORY = TypeAdapter(dict[str, tuple[int, int, str]], config=ConfigDict(defer_build=True))


class AdapterConfig(BaseModel):
    """What is read here of a PEFT adapter's config; PEFT reads the rest."""

    model_config = ConfigDict(defer_build=True)

    base_model_name_or_path: str | None = None
    """A name of the cache of models, a folder, if relative then to the working directory, or a hub id."""
    revision: str | None = None
    """Of the base, where that is a hub id."""


def pretrained_hashes(source: str | Path) -> dict[str, str]:
    """What an LLM that is brought along is read from -> its hash: its folder and, where that holds an adapter, its base; or its
    file. A model of the cache goes by its name, and by the file that it was converted from, wherever the cache is.

    Nothing for a hub id, which its commit hash pins, nor for what is not here.

    Raises:
        UserError: the adapter's config is unreadable.
    """
    named, path = identity(source), Path(source)
    if named is not None:
        return {str(source): named}
    if not path.exists():
        return {}
    own = {path.as_posix(): content_hash(path)}
    adapter = adapter_config(path)
    base = adapter and adapter.base_model_name_or_path
    if not base:
        return own
    named = identity(base)
    if named is not None:
        return own | {base: named}
    return own | ({Path(base).as_posix(): content_hash(Path(base))} if Path(base).is_dir() else {})


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


def base_revision(source: Path | str, revision: str | None, adapter: AdapterConfig) -> str | None:
    """Commit of an adapter's base on the hub. Of an adapter in a folder a revision that is given is the base's, of one on the hub
    its own.

    Args:
        source: of the adapter.
        revision: that was given with it.
    """
    return revision if Path(source).is_dir() and revision is not None else adapter.revision


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
