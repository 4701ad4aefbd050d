"""Dagster assets made from the pipeline table: one a stage, partitioned by recipe."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg
from pydantic import Field, JsonValue

from dmr_pipeline.artifacts import Materialized, materialize_stage, sidecar_path
from dmr_pipeline.recipe import load_recipe, recipe_names
from dmr_pipeline.stage import Stage
from dmr_pipeline.versioning import dvc_stages

OWNERS = ["team:dmr-pipeline"]


class Materialization(dg.Config):
    """How an asset is materialised."""

    force: bool = Field(False, description="make the artefact again although a current one is there")


def recipe_partitions() -> dg.StaticPartitionsDefinition:
    """One partition a recipe, so that experiments live side by side."""
    return dg.StaticPartitionsDefinition(recipe_names())


def build_assets(stages: Sequence[Stage]) -> list[dg.AssetsDefinition]:
    partitions = recipe_partitions()
    return [_build_asset(stage, stages, partitions) for stage in stages]


def _build_asset(stage: Stage, stages: Sequence[Stage], partitions: dg.PartitionsDefinition) -> dg.AssetsDefinition:
    @dg.asset(
        name=stage.name,
        deps=list(stage.inputs),
        partitions_def=partitions,
        group_name=stage.group,
        kinds=set(stage.kinds),
        owners=OWNERS,
        description=stage.description,
        code_version=stage.code_version,
        pool=stage.pool,
        metadata={"recipe_sections": ", ".join(stage.sections)},
    )
    def asset(context: dg.AssetExecutionContext, config: Materialization) -> dg.MaterializeResult:
        recipe = load_recipe(context.partition_key)
        dvc_stages.check_rendered(stages, recipe_names())
        done = materialize_stage(stage, recipe, force=config.force)
        committed = dvc_stages.commit(stage, recipe.name, artifact=done.artifact, rebuilt=not done.skipped)
        return dg.MaterializeResult(
            metadata={**describe(done), "committed_to_dvc": committed}, data_version=dg.DataVersion(done.artifact.hash)
        )

    return asset


def describe(done: Materialized) -> dict[str, dg.MetadataValue]:
    """What the Dagster UI shows of an artefact: where, how large, its summary, its table and its pictures."""
    artifact = done.artifact
    metadata: dict[str, dg.MetadataValue] = {
        "path": dg.MetadataValue.path(artifact.path.resolve()),
        "hash": dg.MetadataValue.text(artifact.hash),
        "size_bytes": dg.MetadataValue.int(artifact.size),
        "files": dg.MetadataValue.int(len(artifact.manifest.files)),
        "was_up_to_date": dg.MetadataValue.bool(done.skipped),
        **{f"summary/{key}": _typed(value) for key, value in artifact.manifest.summary.items()},
    }
    table = artifact.path / "table.md"
    if table.is_file():
        metadata["table"] = dg.MetadataValue.md(table.read_text(encoding="utf-8"))
    for picture in sorted(artifact.path.rglob("*.png")):
        encoded = base64.b64encode(picture.read_bytes()).decode()
        metadata[f"picture/{picture.stem}"] = dg.MetadataValue.md(f"![{picture.stem}](data:image/png;base64,{encoded})")
    return metadata | _describe_run(sidecar_path(artifact.path))


def _describe_run(sidecar: Path) -> dict[str, dg.MetadataValue]:
    """The run that made the artefact; a committed artefact of a fresh clone has none on this machine."""
    if not sidecar.is_file():
        return {}
    record: Mapping[str, JsonValue] = json.loads(sidecar.read_text(encoding="utf-8"))
    shown = {key: record[key] for key in ("started", "finished", "seconds", "git", "measured")}
    return {f"run/{key}": _typed(value) for key, value in shown.items()}


def _typed(value: JsonValue) -> dg.MetadataValue:
    if isinstance(value, bool):
        return dg.MetadataValue.bool(value)
    if isinstance(value, int):
        return dg.MetadataValue.int(value)
    if isinstance(value, float):
        return dg.MetadataValue.float(value)
    if isinstance(value, str):
        return dg.MetadataValue.text(value)
    return dg.MetadataValue.json(value or {})
