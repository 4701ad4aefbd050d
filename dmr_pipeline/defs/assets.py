"""Dagster assets made from the pipeline table: one a stage, partitioned by recipe."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import dagster as dg
from pydantic import Field

from dmr_pipeline.artifacts.manifest import Artifact
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.defs import exchange
from dmr_pipeline.defs.describe import describe
from dmr_pipeline.defs.faults import RETRIES, as_dagster_failures
from dmr_pipeline.defs.sections import build_sections, observe, section_key
from dmr_pipeline.pipeline import find_stage
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe, recipe_names
from dmr_pipeline.versioning import dvc_objects, dvc_stages
from dmr_pipeline.versioning.git_branch import commit_lock

OWNERS = ["team:dmr-pipeline"]


class Materialization(dg.Config):
    """How an asset is materialised."""

    force: bool = Field(False, description="make the artifact again although a current one is there")


def recipe_partitions() -> dg.StaticPartitionsDefinition:
    """One partition a recipe, so that experiments live side by side."""
    return dg.StaticPartitionsDefinition(recipe_names())


def build_assets(stages: Sequence[Stage]) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """The stages, and the recipe sections that they read."""
    partitions = recipe_partitions()
    return [*build_sections(partitions), *(_build_asset(stage, stages, partitions) for stage in stages)]


def op_tags_of(stage: Stage) -> dict[str, Any]:
    """What Ray and Kubernetes are to reserve for a run of the stage; other executors ignore it."""
    needs = stage.resources
    limits = {"cpu": str(needs.cpus), "memory": f"{needs.memory_gb}Gi"}
    if needs.gpus:
        limits["nvidia.com/gpu"] = str(needs.gpus)
    return {
        "dagster-ray/config": {
            "num_cpus": needs.cpus,
            "num_gpus": needs.gpus,
            "memory": needs.memory_gb * 2**30,
        },
        "dagster-k8s/config": {"container_config": {"resources": {"requests": limits, "limits": limits}}},
    }


def _build_asset(stage: Stage, stages: Sequence[Stage], partitions: dg.PartitionsDefinition) -> dg.AssetsDefinition:
    @dg.asset(
        name=stage.name,
        deps=[*stage.inputs, *map(section_key, stage.sections)],
        partitions_def=partitions,
        group_name=stage.group,
        kinds=set(stage.kinds),
        owners=OWNERS,
        description=f"{stage.description}\n\n{stage.reading}",
        code_version=stage.code_version,
        pool=stage.pool,
        op_tags=op_tags_of(stage),
        retry_policy=RETRIES,
        metadata={"recipe_sections": ", ".join(stage.sections)},
    )
    def asset(context: dg.AssetExecutionContext, config: Materialization) -> dg.MaterializeResult:
        with as_dagster_failures(context):
            recipe = load_recipe(context.partition_key)
            dvc_stages.check_recipe_rendered(stages, recipe.name)
            if observe(context.instance, recipe, stage.sections):
                # Dagster read the versions of what this step depends on before.
                context.get_step_execution_context().fetch_external_input_asset_version_info()
            return _materialize(context, stage, stages, recipe, config)

    return asset


def _materialize(
    context: dg.AssetExecutionContext,
    stage: Stage,
    stages: Sequence[Stage],
    recipe: Recipe,
    config: Materialization,
) -> dg.MaterializeResult:
    def accept(artifact: Artifact) -> None:
        dvc_objects.check(find_stage(artifact.path.name, stages), recipe.name, artifact)

    remote = recipe.versioning.remote
    exchanged = remote is not None and not dvc_stages.inside_repro()
    if exchanged:
        exchange.pull_inputs(context.instance, stage, stages, recipe)
    # Also beside a remote: an instance that is new records no history, and dvc.lock does.
    lost_history = dvc_objects.ensure_history(stage, recipe.name, remote=remote, force=config.force)
    done = materialize_stage(
        stage, recipe, force=config.force, run_id=context.run_id, expected=lost_history, accept=accept
    )
    committed = dvc_stages.commit(stage, recipe.name, artifact=done.artifact, rebuilt=not done.skipped)
    metadata = {**describe(done), "committed_to_dvc": dg.MetadataValue.bool(committed)}
    if recipe.versioning.git == "commit" and committed:
        message = f"{dvc_stages.stage_address(stage, recipe.name)} is {done.artifact.hash}"
        commit = commit_lock(message, [dvc_stages.DVC_FILE], datetime.now(UTC).date())
        if commit is not None:
            metadata["git_commit"] = dg.MetadataValue.text(commit)
    if exchanged and recipe.name not in stage.committed_recipes:
        exchange.push(stage, recipe, done.artifact)
    return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(done.artifact.hash))
