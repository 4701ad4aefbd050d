"""Asset checks. Those block whose failure would make what comes after wrong; the others say that a result disappoints."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl
from pydantic import JsonValue

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import Artifact, Manifest, verify
from dmr_pipeline.defs import exchange
from dmr_pipeline.defs.assets import recipe_partitions
from dmr_pipeline.defs.describe import typed
from dmr_pipeline.defs.versions import recorded_version
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.pipeline import STAGES, find_stage
from dmr_pipeline.precision.ladder import LadderFacts
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.summaries import GrpoSummary, KlSummary

if TYPE_CHECKING:
    from dmr_pipeline.defs.expectations import Validation

log = logging.getLogger(__name__)

RATIO_BOUNDS = (0.01, 0.99)
"""Outside of these a router has collapsed to a single precision. Ours."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    failures: Sequence[str]
    """One line each: what was expected, and what is there."""
    facts: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One check of one stage's artifact."""

    stage: str
    name: str
    description: str
    examine: Callable[[Path, Manifest, Recipe], Finding]
    blocking: bool


def tasks_are_disjoint(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    ids = {path.stem: set(pl.read_parquet(path, columns=["task_id"])["task_id"]) for path in folder.glob("*.parquet")}
    failures = [
        f"{len(ids[first] & ids[second])} games are both in {first} and in {second}"
        for first in ids
        for second in ids
        if first < second and ids[first] & ids[second]
    ]
    asked = recipe.benchmark.splits.model_dump()
    failures += [
        f"{split}: {len(ids.get(split, ()))} different games, {asked[split]} asked for"
        for split in asked
        if len(ids.get(split, ())) != asked[split]
    ]
    return Finding(failures, {split: len(games) for split, games in ids.items()})


def routing_can_pay(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    verdict = LadderFacts.model_validate(manifest.summary).verdict
    return Finding([] if verdict.pays else [verdict.text], verdict.model_dump(mode="json"))


def rungs_reload_equal(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    rungs = LadderFacts.model_validate(manifest.summary).rungs
    failures = [f"{rung.name}: a reloaded model gives other logits" for rung in rungs if not rung.reloads_equal]
    made = {rung.name for rung in rungs}
    missing = [rung.name for rung in recipe.precisions.ladder if rung.name not in made]
    return Finding([*failures, *(f"{name}: not on the ladder that was made" for name in missing)])


def divergence_grows_down_the_ladder(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    rungs = LadderFacts.model_validate(manifest.summary).rungs
    failures = [
        f"{below.name} is nearer to the float model ({below.kl_to_float:.6f} nats an action) than"
        f" {above.name} ({above.kl_to_float:.6f})"
        for above, below in pairwise(rungs)
        if below.bytes < above.bytes and below.kl_to_float < above.kl_to_float
    ]
    return Finding(failures, {rung.name: rung.kl_to_float for rung in rungs})


def trajectories_are_complete(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    from dmr_pipeline.defs.expectations import validate_trajectory_episodes, validate_trajectory_steps

    steps, episodes = (pl.read_parquet(folder / f"{name}.parquet") for name in ("steps", "episodes"))
    return _expectations(
        steps=validate_trajectory_steps(steps),
        episodes=validate_trajectory_episodes(episodes, benchmark_of(recipe.benchmark).task_types),
    )


def ingested_episodes_are_complete(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    from dmr_pipeline.defs.expectations import validate_trajectory_episodes
    from dmr_pipeline.ingestion.stored import read_ingested

    try:
        episodes = read_ingested(folder)
    except UserError as error:
        return Finding([str(error)])
    if not episodes:
        return Finding([], {"expectations": 0})
    table = pl.DataFrame([(e.episode_id, e.task_type) for e in episodes], ["episode_id", "task_type"], orient="row")
    return _expectations(episodes=validate_trajectory_episodes(table, benchmark_of(recipe.benchmark).task_types))


def labels_are_sane(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    from dmr_pipeline.defs.expectations import validate_sensitivity_steps

    steps = pl.read_parquet(folder / "steps.parquet")
    return _expectations(
        steps=validate_sensitivity_steps(
            steps, benchmark_of(recipe.benchmark).task_types, recipe.sensitivity.label_share
        )
    )


def kl_router_has_not_collapsed(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    return _spend_within_bounds(KlSummary.model_validate(manifest.summary).validation_spend)


def grpo_router_has_not_collapsed(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    found = GrpoSummary.model_validate(manifest.summary)
    calibrated = found.calibrated_validation_ratio
    return _spend_within_bounds(found.validation_ratio if calibrated is None else calibrated)


def report_is_whole(folder: Path, manifest: Manifest, recipe: Recipe) -> Finding:
    from dmr_pipeline.evaluation.results import failures_of, read_metrics

    metrics = read_metrics(folder)
    return Finding(failures_of(metrics), {"policies": ", ".join(metrics["policies"])})


def _spend_within_bounds(spend: float) -> Finding:
    lowest, highest = RATIO_BOUNDS
    outside = f"spend (of two rungs the high-precision ratio) {spend} on validation games"
    return Finding([] if lowest <= spend <= highest else [outside], {"spend": spend})


def _expectations(**validations: "Validation") -> Finding:
    return Finding(
        [f"{table}: {failure}" for table, validation in validations.items() for failure in validation.failures],
        {"expectations": sum(validation.expectations for validation in validations.values())},
    )


CHECKS = (
    Check(
        "benchmark_tasks",
        "splits_are_disjoint",
        "No game is in two splits, and each split has the number of games that the recipe asks for.",
        tasks_are_disjoint,
        blocking=True,
    ),
    Check(
        "quantized_checkpoints",
        "rungs_reload_equal",
        "Every rung gives the same logits, bit by bit, once it was saved and loaded again.",
        rungs_reload_equal,
        blocking=True,
    ),
    Check(
        "quantized_checkpoints",
        "divergence_grows_down_the_ladder",
        "Each smaller rung is at least as far from the float model as the one above it, by KL on the expert's actions.",
        divergence_grows_down_the_ladder,
        blocking=False,  # what follows compares two rungs by what they do, whichever is nearer to float
    ),
    Check(
        "quantized_checkpoints",
        "routing_can_pay",
        "Between some rungs routing can win something that no single one offers (the verdict on the validation games).",
        routing_can_pay,
        blocking=False,  # that it cannot is a result too
    ),
    Check(
        "trajectories",
        "steps_and_episodes_are_complete",
        "Keys are unique, nothing is null or NaN, task types are known (Great Expectations).",
        trajectories_are_complete,
        blocking=True,
    ),
    Check(
        "ingested_trajectories",
        "episodes_are_complete",
        "Every episode follows the schema, no id is there twice, task types are known (pydantic and Great Expectations).",
        ingested_episodes_are_complete,
        blocking=True,
    ),
    Check(
        "sensitivity_dataset",
        "labels_are_sane",
        "Divergences are finite and not negative, keys unique, task types known, labels within bounds (Great Expectations).",
        labels_are_sane,
        blocking=True,
    ),
    Check(
        "kl_router",
        "router_has_not_collapsed",
        f"On validation games the spend (of two rungs the high-precision ratio) is within {RATIO_BOUNDS}.",
        kl_router_has_not_collapsed,
        blocking=False,  # stage 2 may bring it back, and the report shows it
    ),
    Check(
        "grpo_router",
        "router_has_not_collapsed",
        f"On validation games the spend (of two rungs the high-precision ratio) is within {RATIO_BOUNDS}.",
        grpo_router_has_not_collapsed,
        blocking=False,  # the report shows it, and a release asks for more than that
    ),
    Check(
        "evaluation_report",
        "all_policies_and_sane_intervals",
        "Every policy is there, every estimate lies in its interval, every rate between 0 and 1.",
        report_is_whole,
        blocking=True,
    ),
)


def build_checks(stages: Sequence[str]) -> list[dg.AssetChecksDefinition]:
    """The checks of these stages, and for each stage one of its files. Partitioned as the assets are: an unpartitioned
    check would share one status over all recipes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitions of checks are a preview in Dagster 1.13
        partitions = recipe_partitions()
        return [
            *(_files_check(stage, partitions) for stage in stages),
            *(_build_check(check, partitions) for check in CHECKS if check.stage in stages),
        ]


def _build_check(check: Check, partitions: dg.PartitionsDefinition) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=check.stage,
        name=check.name,
        description=check.description,
        blocking=check.blocking,
        partitions_def=partitions,
    )
    def asset_check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        recipe = load_recipe(context.partition_key)
        artifact = _verified(context, check.stage, recipe)
        found = check.examine(artifact.path, artifact.manifest, recipe)
        return _result(
            check.stage, found, dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN
        )

    return asset_check


def _files_check(stage: str, partitions: dg.PartitionsDefinition) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=stage,
        name="files_are_as_recorded",
        description="Every file is the one that the manifest lists, and the folder's hash the asset's data version.",
        blocking=True,
        partitions_def=partitions,
    )
    def asset_check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        recipe = load_recipe(context.partition_key)
        recorded = recorded_version(context.instance, dg.AssetKey(stage), recipe.name)
        try:
            artifact = _verified(context, stage, recipe)
        except UserError as error:
            return _result(stage, Finding([str(error)]), dg.AssetCheckSeverity.ERROR)
        failures = [f"its hash is {artifact.hash}, recorded was {recorded}"] if artifact.hash != recorded else []
        return _result(stage, Finding(failures, {"hash": artifact.hash}), dg.AssetCheckSeverity.ERROR)

    return asset_check


def _verified(context: dg.AssetCheckExecutionContext, stage: str, recipe: Recipe) -> Artifact:
    """A check is a step of its own: it may run on another machine than the stage did."""
    if recipe.versioning.remote is not None:
        exchange.pull(context.instance, [find_stage(stage, STAGES)], recipe)
    return verify(artifact_folder(stage, recipe.name))


def _result(stage: str, found: Finding, severity: dg.AssetCheckSeverity) -> dg.AssetCheckResult:
    for failure in found.failures:
        log.log(
            logging.ERROR if severity is dg.AssetCheckSeverity.ERROR else logging.WARNING,
            "%s: check failed: %s",
            stage,
            failure,
        )
    return dg.AssetCheckResult(
        passed=not found.failures,
        severity=severity,
        description="; ".join(found.failures) or None,
        metadata={name: typed(fact) for name, fact in found.facts.items()},
    )
