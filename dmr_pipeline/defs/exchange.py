"""Artifacts between machines: a stage's inputs come from the DVC remote by hash, and what it made goes there."""

import logging
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import Artifact, verify
from dmr_pipeline.artifacts.run_record import run_record_beside
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.defs.versions import recorded_at, recorded_version
from dmr_pipeline.errors import UserError
from dmr_pipeline.pipeline import find_stage
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_objects

log = logging.getLogger(__name__)


def pull_inputs(instance: dg.DagsterInstance, stage: Stage, stages: Sequence[Stage], recipe: Recipe) -> None:
    """Make the artifacts that a stage reads here the ones that Dagster's instance records, where they are others; its own too,
    where that is a history that is to grow, unless the one here is newer than any that was recorded.

    Raises:
        UserError: as `pull`; or the history here and the recorded one have both grown.
    """
    pull(instance, [find_stage(name, stages) for name in stage.inputs], recipe)
    if stage.append_only and not _is_newer(instance, stage, recipe):
        pull(instance, [stage], recipe)


def pull(instance: dg.DagsterInstance, stages: Sequence[Stage], recipe: Recipe) -> None:
    """Make these stages' artifacts here the ones that Dagster's instance records, where they are others.

    Raises:
        UserError: an object is neither in DVC's cache here nor in the remote, an artifact that Git carries is another one, or a
            history has grown here and that was not recorded.
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
        if stage.append_only and _is_newer(instance, stage, recipe):
            raise UserError(
                f"{folder} has grown here, and that is not recorded, since the run was broken off:"
                f" `dmr materialize {stage.name} --recipe {recipe.name}` records it and sends it to the remote"
            )
        log.info("%s: %s comes from the DVC remote %s", stage.name, recorded, recipe.versioning.remote)
        dvc_objects.restore(recorded, folder, recipe.versioning.remote)


def _is_newer(instance: dg.DagsterInstance, stage: Stage, recipe: Recipe) -> bool:
    """Whether the history that lies here was never recorded: the run that made it was broken off, or Git and DVC brought it.

    Raises:
        UserError: another one was recorded since it was made here.
    """
    key, folder = dg.AssetKey(stage.name), artifact_folder(stage.name, recipe.name)
    recorded, here = recorded_version(instance, key, recipe.name), _hash(folder)
    if recorded is None or here is None or recorded_at(instance, key, recipe.name, here) is not None:
        return False
    run, at = run_record_beside(folder), recorded_at(instance, key, recipe.name, recorded)
    if run is not None and run.hash == here and at is not None and run.finished < at:
        raise UserError(
            f"{folder} has grown here by a run that was broken off, and on another machine since, at {at:%Y-%m-%d %H:%M} UTC:"
            f" move it away, `dmr pull {recipe.name}` brings the other one, and do again what that one lacks"
        )
    return True


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
