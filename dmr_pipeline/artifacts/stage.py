"""What a stage is, and what its function is given and gives back. Knows nothing of Dagster or DVC."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.model import Pretrained


class DeclaredSections(Recipe):
    """A recipe's name, its way of running, and those sections alone that a stage declares, which are those in its
    provenance: what it reads of another one would make an artifact that counts as current after a change there."""

    @classmethod
    def of(cls, recipe: Recipe, sections: Sequence[str]) -> "DeclaredSections":
        seen = cls.model_construct(**dict(recipe))
        for name in Recipe.model_fields.keys() - {"name", "runtime", *sections}:
            del seen.__dict__[name]
        return seen

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - pydantic's own
        if name in Recipe.model_fields:
            raise AttributeError(
                f"the stage reads the recipe's section {name!r}, which it does not declare in pipeline.py"
            )
        return super().__getattr__(name)  # type: ignore[misc] # hidden from type checkers by pydantic


@dataclass(frozen=True)
class StageContext:
    """Where a stage reads and writes."""

    recipe: Recipe
    """With the sections that the stage declares; reading another one raises AttributeError."""
    inputs: Mapping[str, Path]
    """Upstream asset name -> its folder, verified."""
    output: Path
    """An empty folder that becomes the artifact once the stage returns; nothing run-dependent may be written here."""
    scratch: Path
    """Private resume state; survives a kill, never tracked, emptied after success."""
    previous: Path | None = None
    """The artifact that `output` will replace, verified; given only to stages that keep their history."""
    incoming: Path | None = None
    """Folder in which people drop new trajectories for this recipe; it need not exist."""
    kept: Path | None = None
    """Private folder that outlives success, new inputs and changes of the recipe, for what can be used again; it need not
    exist. Only another code version empties it: what lies there must be known by all else that it depends on."""


@dataclass(frozen=True)
class StageResult:
    """What a stage tells people about its artifact."""

    summary: Mapping[str, Any]
    """JSON. Deterministic facts, kept in the artifact's manifest: counts, rates, metrics."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """JSON. What differs from run to run (times, throughput): goes to the unhashed sidecar."""


@dataclass(frozen=True)
class Resources:
    """What one run of a stage needs of a worker, for executors that place stages on machines (Ray, Kubernetes)."""

    cpus: int = 1
    gpus: int = 0
    memory_gb: int = 2


@dataclass(frozen=True)
class Stage:
    """A row of the pipeline table: a Dagster asset, a DVC stage and a folder of artifacts, all under one name (DVC's of an
    artifact that could lie in Git but does not: see `dvc_stages.group_name`)."""

    name: str
    inputs: tuple[str, ...]
    """Names of the stages whose artifacts this one reads."""
    sections: tuple[str, ...]
    """Recipe sections it reads; a change to any of them makes it stale."""
    code_version: str
    """Raise it when the stage's code would make other bytes from the same inputs and recipe."""
    run: Callable[[StageContext], StageResult]
    group: str
    kinds: frozenset[str]
    """What the Dagster UI shows as badges, such as 'parquet'."""
    description: str
    """What it is: one sentence."""
    reading: str
    """How to read it: what is in which file, and which numbers tell whether it is good. Markdown."""
    committed_recipes: tuple[str, ...] = ()
    """Recipes whose artifact of this stage lies in Git (DVC output with `cache: false`), so that a clone can start from it.
    Those of all other recipes are in DVC's cache, and Git ignores them."""
    pool: str | None = None
    """Dagster pool that limits how many of these run at once."""
    resources: Resources = Resources()
    append_only: bool = False
    """Its artifact grows out of the one before, so that one is never thrown away: a damaged one stops the stage."""
    pretrained: Callable[[Recipe], Sequence[Pretrained]] | None = None
    """The models that people brought and that it reads: new files in the same folder make it stale."""
    pending_inputs: Callable[[Path, str], Sequence[Path]] | None = None
    """(data root, recipe) -> files that it has yet to take in; any make it stale."""
    on_published: Callable[[Path, str], None] | None = None
    """(data root, recipe): what is left to do once the artifact is published, outside of it. Repeated after a kill."""
