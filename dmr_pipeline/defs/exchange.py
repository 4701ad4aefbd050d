"""Artifacts between machines: a stage's inputs come from the DVC remote by hash, and what it made goes there."""

import logging
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import Artifact, verify
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.defs.versions import recorded_version
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_objects

log = logging.getLogger(__name__)


def pull(instance: dg.DagsterInstance, stages: Sequence[Stage], recipe: Recipe) -> None:
    """Make these stages' artifacts here the ones that Dagster's instance records, where they are others.

    Raises:
        UserError: an object is neither in DVC's cache here nor in the remote, or an artifact that Git carries is another one.
    """
    for stage in stages:
        recorded = recorded_version(instance, dg.AssetKey(stage.name), recipe.name)
        folder = artifact_folder(stage.name, recipe.name)
        if recorded is None or _hash(folder) == recorded:
            continue
        if recipe.name in stage.committed_recipes:
            raise UserError(
                f"{folder} is not {recorded}, which is in use: it lies in Git, check out here the commit that has it"
            )
        log.info("%s: %s comes from the DVC remote %s", stage.name, recorded, recipe.versioning.remote)
        dvc_objects.restore(recorded, folder, recipe.versioning.remote)


def _hash(folder: Path) -> str | None:
    """None where there is no valid artifact."""
    try:
        return verify(folder).hash
    except UserError:
        return None


def push(stage: Stage, recipe: Recipe, artifact: Artifact) -> None:
    """Put the artifact into the recipe's remote.

    Raises:
        UserError: the remote cannot be written.
    """
    sent = dvc_objects.push(artifact.hash, recipe.versioning.remote)
    log.info("%s: %d objects sent to the DVC remote %s", stage.name, sent, recipe.versioning.remote)
