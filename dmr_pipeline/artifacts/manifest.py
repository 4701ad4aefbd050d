"""Artifacts: a stage's folder of files, published whole, described by a manifest, verified on every read.

`data/<recipe>/<stage>/` is the artifact and all of it is hashed; nothing in it differs from run to run. What does
differ (times, versions, machine) lies beside it in `<stage>.run.json`. The hash of a folder is DVC's own, so that one
number names an artifact in Dagster and in DVC.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, JsonValue, ValidationError

from dmr_pipeline.artifacts.folders import recover
from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.hashing import file_md5

MANIFEST = "manifest.json"


class Manifest(FrozenModel):
    """What an artifact was made from and what it holds. Part of the hashed folder."""

    stage: str
    recipe: str
    code_version: str
    sections: dict[str, JsonValue]
    """Content of the recipe sections that the stage reads, defaults filled in."""
    inputs: dict[str, str]
    """Input stage -> its folder's hash."""
    files: dict[str, str]
    """Path in the folder (posix) -> md5 of the file; the manifest itself is left out."""
    summary: dict[str, JsonValue]
    pretrained: dict[str, str] = Field({}, exclude_if=lambda folders: not folders)
    """Folder or file outside of the pipeline that a model was read from -> hash of its content."""

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Artifact:
    """An artifact that was verified."""

    path: Path
    hash: str
    """DVC's directory hash, '<md5>.dir'."""
    size: int
    """Bytes of all files."""
    manifest: Manifest


def hash_files(folder: Path) -> dict[str, str]:
    """md5 of every file in the folder, by its posix path relative to it."""
    return {path.relative_to(folder).as_posix(): file_md5(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def write_manifest(
    folder: Path,
    *,
    stage: str = "",
    recipe: str = "",
    code_version: str = "",
    sections: Mapping[str, JsonValue] | None = None,
    inputs: Mapping[str, str] | None = None,
    pretrained: Mapping[str, str] | None = None,
    summary: Mapping[str, JsonValue] | None = None,
) -> Manifest:
    """Describe what is in the folder, in the folder. Arguments as in `Manifest`; without any, it is of a stage that was called
    by itself, in no run of the pipeline."""
    (folder / MANIFEST).unlink(missing_ok=True)
    manifest = Manifest(
        stage=stage or folder.name,
        recipe=recipe,
        code_version=code_version,
        sections=dict(sections or {}),
        inputs=dict(inputs or {}),
        files=hash_files(folder),
        summary=dict(summary or {}),
        pretrained=dict(pretrained or {}),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def folder_hash(files: Mapping[str, str]) -> str:
    """DVC's hash of a folder with these files: md5 over the JSON list of {md5, relpath}, sorted by relpath."""
    entries = [{"md5": md5, "relpath": relpath} for relpath, md5 in sorted(files.items())]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def verify(folder: Path) -> Artifact:
    """Read the manifest of `data/<recipe>/<stage>` and compare every file with it.

    Raises:
        UserError: the artifact is missing, or a file of it is missing, changed or one too many.
    """
    command = f"dmr materialize {folder.name} --recipe {folder.parent.name}"
    remedy = remedies(folder)
    recover(folder)
    if not folder.is_dir():
        whole = f"dmr run {folder.parent.name}"
        raise UserError(f"{folder} is missing: make it with `{command}`, or all that is missing with `{whole}`")
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise UserError(f"{folder / MANIFEST} is missing or malformed: {remedy}") from error
    files = hash_files(folder)
    found = {relpath: md5 for relpath, md5 in files.items() if relpath != MANIFEST}
    for relpath in sorted(found.keys() | manifest.files.keys()):
        if found.get(relpath) != manifest.files.get(relpath):
            problem = (
                "is missing"
                if relpath not in found
                else "was changed"
                if relpath in manifest.files
                else "does not belong there"
            )
            raise UserError(f"{folder / relpath} {problem}: {remedy}")
    return Artifact(folder, folder_hash(files), sum((folder / relpath).stat().st_size for relpath in files), manifest)


def remedies(folder: Path) -> str:
    """What to do where the artifact of `data/<recipe>/<stage>` is damaged."""
    address = f"{folder.name} --recipe {folder.parent.name}"
    return f"get it back with `dmr restore {address}`, or make it again with `dmr materialize {address} --force`"
