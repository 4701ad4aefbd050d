"""Where an artifact comes from: the artifacts and runs behind it, back to the seeds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import MANIFEST, Artifact, verify
from dmr_pipeline.artifacts.run_record import RunRecord, read_run_record
from dmr_pipeline.errors import UserError
from dmr_pipeline.pipeline import STAGES
from dmr_pipeline.versioning import dvc_objects


@dataclass(frozen=True)
class Origin:
    """An artifact of the chain as it is there now."""

    artifact: Artifact
    run: RunRecord | None
    """None where it was made elsewhere."""

    def seeds(self) -> dict[str, JsonValue]:
        """Every key 'seed' of the recipe sections that the stage reads, by its dotted path."""
        return dict(_seeds(self.artifact.manifest.sections, ""))


@dataclass(frozen=True)
class Chain:
    """An artifact and all that it was made from."""

    stage: str
    """Of the artifact that was asked for."""
    origins: dict[str, Origin]
    """Stage -> its artifact, that one first."""
    problems: dict[str, str]
    """Stage -> why there is no valid artifact of it any more, in one line."""

    def now(self, stage: str) -> str | None:
        """Hash of a stage's artifact as it is there now."""
        origin = self.origins.get(stage)
        return None if origin is None else origin.artifact.hash


def trace(path: Path) -> Chain:
    """Follow the manifests of the artifact that `path` is, or lies in. Its inputs are looked for beside it.

    Raises:
        UserError: the path is missing or belongs to no artifact, or the artifact is damaged.
    """
    first = _verified(_artifact_around(path))
    origins: dict[str, Origin] = {}
    problems: dict[str, str] = {}

    def follow(artifact: Artifact) -> None:
        origins[artifact.path.name] = Origin(artifact, read_run_record(artifact))
        for name in artifact.manifest.inputs:
            if name in origins or name in problems:
                continue
            try:
                found = _verified(artifact.path.with_name(name))
            except UserError as error:
                problems[name] = str(error)
            else:
                follow(found)

    follow(first)
    return Chain(first.path.name, origins, problems)


def _verified(folder: Path) -> Artifact:
    """The artifact in the folder.

    Raises:
        UserError: it is damaged.
    """
    artifact = verify(folder)
    stage = next((stage for stage in STAGES if stage.name == folder.name), None)
    if stage is not None and folder == artifact_folder(stage.name, folder.parent.name).resolve():
        dvc_objects.check(stage, folder.parent.name, artifact)
    return artifact


def common_libraries(chain: Chain) -> dict[str, str]:
    """Versions of the libraries, and of Python, that all recorded runs of the chain shared."""
    versions = [run_libraries(origin.run) for origin in chain.origins.values() if origin.run is not None]
    first = versions[0] if versions else {}
    return {name: version for name, version in first.items() if all(run.get(name) == version for run in versions)}


def run_libraries(run: RunRecord) -> dict[str, str]:
    """Versions of Python and of the libraries that were installed."""
    return {"python": run.python} | {name: version for name, version in run.libraries.items() if version is not None}


def _artifact_around(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist: give an artifact's folder, data/<recipe>/<stage>, or a file in it")
    absolute = path.resolve()
    for folder in (absolute, *absolute.parents):
        if (folder / MANIFEST).is_file():
            return folder
    raise UserError(f"{path} belongs to no artifact: give data/<recipe>/<stage>, or a file in it")


def _seeds(value: JsonValue, prefix: str) -> Iterator[tuple[str, JsonValue]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "seed":
                yield prefix + key, inner
            else:
                yield from _seeds(inner, f"{prefix}{key}.")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _seeds(inner, f"{prefix}{index}.")
