"""What decides an artifact's content, and whether one that is there is of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from dmr_pipeline.artifacts.manifest import Manifest
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.pretrained import pretrained_hashes
from dmr_pipeline.recipe import Recipe


@dataclass(frozen=True)
class Provenance:
    """All that decides an artifact's content."""

    stage: str
    recipe: str
    code_version: str
    sections: dict[str, JsonValue]
    inputs: dict[str, str]
    pretrained: dict[str, str]
    """Of the models of the cache, by name, and of the folders and files that are there: where one is not, a model that was read
    from it is taken to be the same."""

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, manifest: Manifest) -> str | None:
        """Why the manifest's artifact is stale, in a few words; None where it is current."""
        if manifest.code_version != self.code_version:
            return f"code version {manifest.code_version} -> {self.code_version}"
        sections = [name for name in self.sections if manifest.sections.get(name) != self.sections[name]]
        if sections or manifest.sections.keys() != self.sections.keys():
            return f"recipe changed: {', '.join(sections) or 'sections'}"
        inputs = [name for name in self.inputs if manifest.inputs.get(name) != self.inputs[name]]
        if inputs or manifest.inputs.keys() != self.inputs.keys():
            return f"input changed: {', '.join(inputs) or 'inputs'}"
        folders = [name for name in self.pretrained if manifest.pretrained.get(name) != self.pretrained[name]]
        if folders:
            return f"pretrained model changed: {', '.join(folders)}"
        return None


def provenance(stage: Stage, recipe: Recipe, inputs: Mapping[str, str]) -> Provenance:
    """What decides the content of a stage's artifact.

    Args:
        inputs: input stage -> hash of its folder.
    """
    sections = {name: getattr(recipe, name).model_dump(mode="json") for name in stage.sections}
    models = stage.pretrained(recipe) if stage.pretrained is not None else []
    found = {path: content for model in models for path, content in pretrained_hashes(model.model).items()}
    pretrained = dict(sorted(found.items()))
    return Provenance(stage.name, recipe.name, stage.code_version, sections, dict(inputs), pretrained)
