"""New trajectories are ingested and start retrainings; both the sensor and the schedule ship stopped."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import dagster as dg
from pydantic import ValidationError

from dmr_pipeline.artifacts.folders import DATA_ROOT, artifact_folder
from dmr_pipeline.artifacts.manifest import MANIFEST, Manifest
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe, recipe_names
from dmr_pipeline.summaries import IngestedSummary, SensitivitySummary

INGEST_TAG = "dmr/incoming"
RETRAIN_TAG = "dmr/ingested"
PARTITION_TAG = "dagster/partition"
"""Dagster's own, of every run of a partition, whoever has started it."""
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
ATTEMPTS = 5
"""Runs that may try to ingest the same files; a run that dies is followed by another, but not for ever."""

MEMORY = {"memory": "4Gi"}
"""Of the pod that ingests; of others that run in Kubernetes the pipeline table says what they need."""

whole_pipeline = dg.define_asset_job(
    "whole_pipeline",
    selection=dg.AssetSelection.all(),
    description="One recipe, from its games to its report and release.",
)
ingest = dg.define_asset_job(
    "ingest",
    selection=dg.AssetSelection.assets("ingested_trajectories"),
    executor_def=dg.in_process_executor,  # on this machine: the dropped files are here
    # Its pod holds all that was ever ingested, and what is dropped, at once: some 15 bytes a byte of short steps.
    tags={"dagster-k8s/config": {"container_config": {"resources": {"requests": MEMORY, "limits": MEMORY}}}},
    description="Takes the files of data/incoming/<recipe>/ into ingested_trajectories.",
)
retrain = dg.define_asset_job(
    "retrain",
    selection=dg.AssetSelection.assets("sensitivity_dataset").downstream(),
    description="From the labels to the report and the release, on all trajectories that there are by now.",
)


def build_trajectory_sensor(recipes: Sequence[str]) -> dg.SensorDefinition:
    """What is dropped is ingested, and enough of it starts a retraining.

    Args:
        recipes: those that are partitions.
    """

    @dg.sensor(
        name="new_trajectories",
        jobs=[ingest, retrain],
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Ingests what is dropped into data/incoming/<recipe>/, told apart by content. Retrains once"
        " `retraining.min_new_steps` steps of the recipe are new.",
    )
    def new_trajectories(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        from dmr_pipeline.ingestion.inbox import archive, lying_files, misplaced_lines, waiting_contents

        requests, reasons = [], [*misplaced_lines(DATA_ROOT, recipe_names()), *added_since(recipes)]
        for name in recipes:
            try:
                recipe = load_recipe(name)
                archive(DATA_ROOT, name)
                waiting = waiting_contents(DATA_ROOT, name)
                reasons += lying_files(DATA_ROOT, name)
            except UserError as error:
                reasons.append(str(error))
                continue
            if busy := unfinished(context.instance, name, ingest.name, retrain.name):
                found: list[dg.RunRequest | str] = [busy]
            else:
                found = [_retraining(context.instance, recipe)]
                # Labels are refused where what is ingested changes while they are made: files that wait are taken after them.
                if waiting and isinstance(found[0], str):
                    found.append(_ingestion(context.instance, name, waiting))
            requests += [one for one in found if isinstance(one, dg.RunRequest)]
            reasons += [f"{name}: {one}" for one in found if isinstance(one, str)]
        return dg.SensorResult(run_requests=requests) if requests else dg.SkipReason("; ".join(reasons))

    return new_trajectories


def added_since(recipes: Sequence[str]) -> list[str]:
    """A line for each recipe that came after Dagster read them: a run that was asked for it would stop all others."""
    return [
        f"{name}: its recipe is newer than Dagster's list of them: reload the code location (Deployment), or start Dagster anew"
        for name in recipe_names()
        if name not in recipes
    ]


def unfinished(instance: dg.DagsterInstance, recipe: str, *jobs: str) -> str | None:
    """Which run of one of these jobs goes on for the recipe, or waits to; None where there is none."""
    for job in jobs:
        going_on = dg.RunsFilter(job_name=job, tags={PARTITION_TAG: recipe}, statuses=UNFINISHED)
        for run in instance.get_runs(going_on, limit=1):
            return f"the run {run.run_id[:8]} of the job `{job}` has not ended"
    return None


def _ingestion(instance: dg.DagsterInstance, recipe: str, waiting: str) -> dg.RunRequest | str:
    """A run for exactly these contents (`waiting_contents`), or why there is none."""
    key = waiting[:16]
    before = instance.get_runs(dg.RunsFilter(job_name=ingest.name, tags={INGEST_TAG: key}))
    if len(before) >= ATTEMPTS:
        return f"{len(before)} runs failed to ingest its files: see them, and start the job `ingest` by hand"
    return dg.RunRequest(
        run_key=f"{key}/{len(before)}", job_name=ingest.name, partition_key=recipe, tags={INGEST_TAG: key}
    )


def _retraining(instance: dg.DagsterInstance, recipe: Recipe) -> dg.RunRequest | str:
    """A run on what is ingested by now, or why there is none."""
    try:
        new = new_steps(recipe.name)
        ingested = _manifest("ingested_trajectories", recipe.name)
    except UserError as error:
        return str(error)
    if new is None:
        return "nothing to retrain yet: its sensitivity_dataset or ingested_trajectories has not been made"
    if new < recipe.retraining.min_new_steps:
        return f"{new} new steps of the {recipe.retraining.min_new_steps} that start a retraining"
    key = hashlib.sha256(ingested.to_json().encode()).hexdigest()[:16] if ingested else ""
    for run in instance.get_runs(dg.RunsFilter(job_name=retrain.name, tags={RETRAIN_TAG: key}), limit=1):
        ended = {dg.DagsterRunStatus.FAILURE: "failed", dg.DagsterRunStatus.CANCELED: "was cancelled"}.get(run.status)
        how = (
            f"{ended} (run {run.run_id[:8]}): see why, and start the job `retrain`" if ended else "was started already"
        )
        return f"{new} new steps: their retraining {how}"
    return dg.RunRequest(
        run_key=f"retrain/{key}", job_name=retrain.name, partition_key=recipe.name, tags={RETRAIN_TAG: key}
    )


def build_weekly_schedule(recipes: Sequence[str]) -> dg.ScheduleDefinition:
    """Arguments as of `build_trajectory_sensor`."""

    @dg.schedule(
        job=retrain,
        cron_schedule="0 3 * * 1",
        execution_timezone="UTC",
        name="weekly_retraining",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Mondays at 3:00 UTC: retrains every recipe with ingested steps that its labels have not seen yet.",
    )
    def weekly_retraining(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        due, reasons = [], added_since(recipes)
        for name in recipes:
            try:
                if (new_steps(name) or 0) > 0:
                    if busy := unfinished(context.instance, name, ingest.name, retrain.name):
                        reasons.append(f"{name}: {busy}")
                    else:
                        due.append(name)
            except UserError as error:
                reasons.append(f"{name}: {error}")
        for name in due:
            yield dg.RunRequest(run_key=None, partition_key=name)
        if not due:
            yield dg.SkipReason("; ".join(reasons) or "no recipe has new steps")

    return weekly_retraining


def new_steps(recipe: str) -> int | None:
    """Ingested steps that the sensitivity dataset has not seen; None where one of the two is missing.

    Raises:
        UserError: a manifest is damaged.
    """
    ingested, labelled = (_manifest(stage, recipe) for stage in ("ingested_trajectories", "sensitivity_dataset"))
    if ingested is None or labelled is None:
        return None
    with _damaged_is_user_error(recipe):
        seen = SensitivitySummary.model_validate(labelled.summary).ingested_steps
        return IngestedSummary.model_validate(ingested.summary).steps - seen


def _manifest(stage: str, recipe: str) -> Manifest | None:
    path = artifact_folder(stage, recipe) / MANIFEST
    with _damaged_is_user_error(recipe):
        return Manifest.model_validate_json(path.read_bytes()) if path.is_file() else None


@contextmanager
def _damaged_is_user_error(recipe: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise UserError(f"a manifest is damaged: `dmr status {recipe}` names it") from error
