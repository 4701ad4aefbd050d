"""Asset checks. The ones on tables block: nothing downstream runs on a bad table."""

import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

import dagster as dg
import polars as pl

from dmr_pipeline.artifacts import MANIFEST, Manifest, artifact_folder
from dmr_pipeline.defs.assets import recipe_partitions
from dmr_pipeline.environments.alfworld.game import TaskType
from dmr_pipeline.recipe import load_recipe

if TYPE_CHECKING:
    from dmr_pipeline.defs.expectations import Validation

log = logging.getLogger(__name__)


def build_checks() -> list[dg.AssetChecksDefinition]:
    """Partitioned as the assets are: an unpartitioned check would share one status over all recipes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitions of checks are a preview in Dagster 1.13
        return _build_checks(recipe_partitions())


def _build_checks(partitions: dg.PartitionsDefinition) -> list[dg.AssetChecksDefinition]:
    @dg.asset_check(
        asset="trajectories",
        name="steps_and_episodes_are_complete",
        description="Keys are unique, nothing is null or NaN, task types are known.",
        blocking=True,
        partitions_def=partitions,
    )
    def trajectories_check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        from dmr_pipeline.defs.expectations import validate_trajectory_episodes, validate_trajectory_steps

        folder = artifact_folder("trajectories", context.partition_key)
        return _result(
            "trajectories",
            {
                "steps": validate_trajectory_steps(pl.read_parquet(folder / "steps.parquet")),
                "episodes": validate_trajectory_episodes(
                    pl.read_parquet(folder / "episodes.parquet"), get_args(TaskType)
                ),
            },
        )

    @dg.asset_check(
        asset="sensitivity_dataset",
        name="labels_are_sane",
        description="Divergences are finite and not negative, keys unique, task types known, labels within bounds.",
        blocking=True,
        partitions_def=partitions,
    )
    def sensitivity_check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        from dmr_pipeline.defs.expectations import validate_sensitivity_steps

        label_share = load_recipe(context.partition_key).sensitivity.label_share
        steps = pl.read_parquet(artifact_folder("sensitivity_dataset", context.partition_key) / "steps.parquet")
        return _result(
            "sensitivity_dataset", {"steps": validate_sensitivity_steps(steps, get_args(TaskType), label_share)}
        )

    @dg.asset_check(
        asset="quantized_checkpoints",
        name="precisions_leave_a_gap",
        description="High succeeds often enough on validation games, and low so much less that routing can matter.",
        blocking=False,  # a missing gap is a result too: the later stages then run on the rung with the largest one
        partitions_def=partitions,
    )
    def gate_check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        manifest = artifact_folder("quantized_checkpoints", context.partition_key) / MANIFEST
        gate = Manifest.model_validate_json(manifest.read_bytes()).summary["gate"]
        if not isinstance(gate, dict):
            raise TypeError(f"{manifest}: summary.gate is {gate!r}, not a mapping")
        if not gate["passed"]:
            log.warning("gate of the precisions not passed: success %s at high, %s at low", gate["high"], gate["low"])
        return dg.AssetCheckResult(
            passed=bool(gate["passed"]),
            severity=dg.AssetCheckSeverity.WARN,
            metadata={"gate": dg.MetadataValue.json(gate)},
        )

    return [trajectories_check, sensitivity_check, gate_check]


def _result(asset: str, validations: Mapping[str, "Validation"]) -> dg.AssetCheckResult:
    failures = [f"{table}: {failure}" for table, validation in validations.items() for failure in validation.failures]
    for failure in failures:
        log.error("%s: check failed: %s", asset, failure)
    return dg.AssetCheckResult(
        passed=all(validation.success for validation in validations.values()),
        metadata={
            "failures": dg.MetadataValue.json(failures),
            "expectations": sum(validation.expectations for validation in validations.values()),
        },
    )
