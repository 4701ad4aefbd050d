import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.stage import Stage, StageContext, StageResult
from dmr_pipeline.definitions import defs
from dmr_pipeline.defs import runs
from dmr_pipeline.defs.automation import (
    ATTEMPTS,
    INGEST_TAG,
    PARTITION_TAG,
    RETRAIN_TAG,
    build_trajectory_sensor,
    build_weekly_schedule,
)
from dmr_pipeline.ingestion.schema import EXAMPLE
from dmr_pipeline.recipe import Recipe
from tests.helpers.fake_project import RECIPE, SUMMARIES, fake_run

INCOMING = Path("data/incoming") / RECIPE
TABLE = pipeline.STAGES
new_trajectories, weekly_retraining = build_trajectory_sensor([RECIPE]), build_weekly_schedule([RECIPE])


def with_real_ingestion() -> tuple[Stage, ...]:
    """The fake stages, but ingestion is the real one, and the labels count what it has ingested."""

    def label(context: StageContext) -> StageResult:
        result = fake_run(context)
        steps = verify(context.inputs["ingested_trajectories"]).manifest.summary["steps"]
        return replace(result, summary={**result.summary, **SUMMARIES["sensitivity_dataset"], "ingested_steps": steps})

    real = next(stage for stage in TABLE if stage.name == "ingested_trajectories")
    changed = {"ingested_trajectories": real}
    return tuple(
        replace(stage, run=label) if stage.name == "sensitivity_dataset" else changed.get(stage.name, stage)
        for stage in pipeline.STAGES
    )


@pytest.fixture
def instance(finished_project: Recipe, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setattr(pipeline, "STAGES", with_real_ingestion())
    recipe = Path(f"recipes/{RECIPE}.yaml")
    recipe.write_text(recipe.read_text() + "retraining: {min_new_steps: 3}\n")
    with dg.DagsterInstance.get() as opened:
        yield opened


def drop(name: str, episode_id: str, steps: int = 2, folder: Path = INCOMING) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    step = {"command": "look", "observation": "Nothing happens.", "precision": "float"}
    path = folder / name
    path.write_text(json.dumps({**EXAMPLE, "episode_id": episode_id, "steps": [step] * steps}) + "\n")
    return path


def tick(instance: dg.DagsterInstance, *others: str) -> list[dg.RunRequest] | str:
    """What one evaluation of the sensor asks for, or why it asks for nothing."""
    result = build_trajectory_sensor([RECIPE, *others])(dg.build_sensor_context(instance=instance))
    if isinstance(result, dg.SkipReason):
        return result.skip_message or ""
    return list(result.run_requests or [])


def run_of(instance: dg.DagsterInstance, request: dg.RunRequest, status: dg.DagsterRunStatus) -> None:
    tags = {**request.tags, PARTITION_TAG: request.partition_key}  # as Dagster's daemon has it
    create_run_for_test(instance, job_name=request.job_name, tags=tags, status=status)


def test_sensor_and_schedule_ship_stopped():
    assert new_trajectories.default_status is dg.DefaultSensorStatus.STOPPED
    assert weekly_retraining.default_status is dg.DefaultScheduleStatus.STOPPED
    assert (weekly_retraining.cron_schedule, weekly_retraining.execution_timezone) == ("0 3 * * 1", "UTC")


def test_nothing_dropped_asks_for_nothing(instance: dg.DagsterInstance):
    assert "0 new steps of the 3" in tick(instance)


def test_dropped_files_are_asked_for_by_content_and_once(instance: dg.DagsterInstance):
    first = drop("a.jsonl", "one")
    (request,) = tick(instance)
    assert (request.job_name, request.partition_key) == ("ingest", RECIPE)
    first.touch()
    first.rename(INCOMING / "renamed.jsonl")
    (again,) = tick(instance)
    assert again.run_key == request.run_key, "neither time nor name of a file make it another one"
    drop("renamed.jsonl", "other")
    (other,) = tick(instance)
    assert other.run_key != request.run_key

    run_of(instance, other, dg.DagsterRunStatus.STARTED)
    assert "of the job `ingest` has not ended" in tick(instance)
    drop("later.jsonl", "third")
    assert "of the job `ingest` has not ended" in tick(instance), "files that come meanwhile wait for it too"


def test_files_that_are_still_written_are_left_alone(instance: dg.DagsterInstance):
    drop("a.jsonl.part", "one")
    assert isinstance(tick(instance), str)


def test_a_run_that_died_is_followed_by_another_but_not_for_ever(instance: dg.DagsterInstance):
    drop("a.jsonl", "one")
    keys = set()
    for _ in range(ATTEMPTS):
        (request,) = tick(instance)
        keys.add(request.run_key)
        run_of(instance, request, dg.DagsterRunStatus.FAILURE)
    assert len(keys) == ATTEMPTS, "Dagster starts one run for a key"
    assert "start the job `ingest` by hand" in tick(instance)


def test_from_a_dropped_file_to_one_retraining(instance: dg.DagsterInstance):
    drop("good.jsonl", "one", steps=2)
    bad = drop("bad.jsonl", "two")
    bad.write_text(bad.read_text()[:-20])
    (request,) = tick(instance)
    runs.materialize(pipeline.STAGES, RECIPE, ["ingested_trajectories"])
    assert verify(artifact_folder("ingested_trajectories", RECIPE)).manifest.summary["episodes"] == 1
    assert [path.name for path in INCOMING.iterdir() if path.is_file()] == []
    (quarantined,) = (INCOMING / "quarantine").glob("*-bad.jsonl")
    assert "not JSON" in quarantined.with_name(f"{quarantined.name}.reason.txt").read_text()
    assert "2 new steps of the 3" in tick(instance)

    drop("more.jsonl", "three", steps=1)
    assert len(tick(instance)) == 1
    runs.materialize(pipeline.STAGES, RECIPE, ["ingested_trajectories"])
    (request,) = tick(instance)
    assert (request.job_name, request.partition_key) == ("retrain", RECIPE)
    run_of(instance, request, dg.DagsterRunStatus.FAILURE)
    reason = tick(instance)
    assert "their retraining failed (run " in reason, "one that fails is for a person to look at"
    assert "start the job `retrain`" in reason

    runs.materialize(pipeline.STAGES, RECIPE, ["sensitivity_dataset"])
    assert "0 new steps" in tick(instance)


def test_a_retraining_is_started_again_for_what_comes_later(instance: dg.DagsterInstance):
    for number in range(2):
        drop(f"{number}.jsonl", f"episode {number}", steps=3)
        runs.materialize(pipeline.STAGES, RECIPE, ["ingested_trajectories"])
        (request,) = tick(instance)
        assert request.tags[RETRAIN_TAG]
        run_of(instance, request, dg.DagsterRunStatus.SUCCESS)
        runs.materialize(pipeline.STAGES, RECIPE, ["sensitivity_dataset"])


def test_a_recipe_that_came_after_dagster_read_them_is_named_and_stops_no_other(instance: dg.DagsterInstance):
    later = Path("recipes/later.yaml")
    later.write_text(Path(f"recipes/{RECIPE}.yaml").read_text())
    drop("a.jsonl", "one", folder=INCOMING.parent / "later")
    assert "later: its recipe is newer than Dagster's list of them" in tick(instance)
    drop("a.jsonl", "two")
    assert [request.partition_key for request in tick(instance)] == [RECIPE]
    (skipped,) = weekly_retraining(dg.build_schedule_context(instance))
    assert "later: its recipe is newer" in (skipped.skip_message or "")


def test_the_schedule_retrains_where_steps_are_new(instance: dg.DagsterInstance):
    (skipped,) = weekly_retraining(dg.build_schedule_context(instance))
    assert isinstance(skipped, dg.SkipReason)
    drop("a.jsonl", "one", steps=1)
    runs.materialize(pipeline.STAGES, RECIPE, ["ingested_trajectories"])
    (request,) = weekly_retraining(dg.build_schedule_context(instance))
    assert request.partition_key == RECIPE


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_nothing_is_started_beside_a_retraining(instance: dg.DagsterInstance, status: dg.DagsterRunStatus):
    """Its labels are refused where what is ingested changes meanwhile, and two retrainings learn the same."""
    drop("a.jsonl", "one", steps=3)
    runs.materialize(pipeline.STAGES, RECIPE, ["ingested_trajectories"])
    (request,) = tick(instance)
    run_of(instance, request, status)
    drop("b.jsonl", "two", steps=3)
    assert "of the job `retrain` has not ended" in tick(instance)
    runs.materialize(pipeline.STAGES, RECIPE, ["ingested_trajectories"])
    assert "of the job `retrain` has not ended" in tick(instance)
    (skipped,) = weekly_retraining(dg.build_schedule_context(instance))
    assert "of the job `retrain` has not ended" in (skipped.skip_message or "")

    for run in instance.get_runs():
        instance.report_run_canceled(run)
    assert [request.job_name for request in tick(instance)] == ["retrain"]
    create_run_for_test(instance, job_name="ingest", tags={PARTITION_TAG: RECIPE}, status=dg.DagsterRunStatus.STARTED)
    (skipped,) = weekly_retraining(dg.build_schedule_context(instance))
    assert "of the job `ingest` has not ended" in (skipped.skip_message or "")
    for run in instance.get_runs(dg.RunsFilter(job_name="ingest")):
        instance.report_run_canceled(run)
    assert [request.partition_key for request in weekly_retraining(dg.build_schedule_context(instance))] == [RECIPE]


def test_a_run_of_another_recipe_holds_nothing_up(instance: dg.DagsterInstance):
    drop("a.jsonl", "one", steps=3)
    tags = {PARTITION_TAG: "another"}
    for job in ("ingest", "retrain"):
        create_run_for_test(instance, job_name=job, tags=tags, status=dg.DagsterRunStatus.STARTED)
    assert [request.job_name for request in tick(instance)] == ["ingest"]


def test_files_that_wait_hold_no_retraining_up_and_are_taken_after_it(instance: dg.DagsterInstance):
    drop("a.jsonl", "one", steps=3)
    runs.materialize(pipeline.STAGES, RECIPE, ["ingested_trajectories"])
    drop("b.jsonl", "two", steps=1)
    (request,) = tick(instance)
    assert request.job_name == "retrain"
    run_of(instance, request, dg.DagsterRunStatus.FAILURE)
    assert [request.job_name for request in tick(instance)] == ["ingest"]


def test_files_whose_ingestion_failed_for_good_hold_no_retraining_up(instance: dg.DagsterInstance):
    drop("bad.jsonl", "one", steps=1)
    for _ in range(ATTEMPTS):
        (request,) = tick(instance)
        run_of(instance, request, dg.DagsterRunStatus.FAILURE)
    waiting = INCOMING / "bad.jsonl"
    waiting.rename("bad.jsonl")
    drop("good.jsonl", "two", steps=3)
    runs.materialize(pipeline.STAGES, RECIPE, ["ingested_trajectories"])
    Path("bad.jsonl").rename(waiting)
    assert [request.job_name for request in tick(instance)] == ["retrain"]


def test_a_damaged_manifest_of_the_labels_holds_no_ingestion_up(instance: dg.DagsterInstance):
    manifest = artifact_folder("sensitivity_dataset", RECIPE) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    drop("a.jsonl", "one")
    assert [request.job_name for request in tick(instance)] == ["ingest"]


def test_misplaced_files_and_bad_recipes_are_named_and_stop_nothing(instance: dg.DagsterInstance):
    drop("lost.jsonl", "one", folder=INCOMING.parent)
    Path("recipes/broken.yaml").write_text("benchmark: 1\n")
    reason = tick(instance, "broken")
    assert "data/incoming/lost.jsonl" in reason
    assert "broken.yaml" in reason
    drop("a.jsonl", "two")
    assert [request.partition_key for request in tick(instance, "broken")] == [RECIPE]


def test_a_damaged_manifest_is_named_and_stops_no_other_recipe(instance: dg.DagsterInstance):
    manifest = artifact_folder("ingested_trajectories", RECIPE) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    assert f"{RECIPE}: a manifest is damaged: `dmr status {RECIPE}` names it" in tick(instance)
    (skipped,) = weekly_retraining(dg.build_schedule_context(instance))
    assert "a manifest is damaged" in (skipped.skip_message or "")


def test_what_is_no_file_is_named_or_asked_for_but_never_opened(instance: dg.DagsterInstance):
    (INCOMING / "[folder]\x1b").mkdir(parents=True)
    assert rf"{INCOMING}/[folder]\x1b: it is a folder, no file" in tick(instance)
    os.mkfifo(INCOMING / "pipe.jsonl")
    (INCOMING / "link.jsonl").symlink_to("nowhere")
    (request,) = tick(instance)
    assert tick(instance)[0].run_key == request.run_key
    (INCOMING / "link.jsonl").unlink()
    assert tick(instance)[0].run_key != request.run_key


def test_ingestion_runs_where_the_files_are(finished_project: Recipe):
    job = defs().get_job_def("ingest")
    assert job.executor_def is dg.in_process_executor
    assert {key.to_user_string() for key in job.asset_layer.selected_asset_keys} == {"ingested_trajectories"}


def test_retraining_goes_from_the_labels_to_the_release(finished_project: Recipe):
    selected = {key.to_user_string() for key in defs().get_job_def("retrain").asset_layer.selected_asset_keys}
    assert selected == {"sensitivity_dataset", "kl_router", "grpo_router", "evaluation_report", "released_router"}


def test_requests_are_tagged_so_that_their_runs_are_found(instance: dg.DagsterInstance):
    drop("a.jsonl", "one")
    (request,) = tick(instance)
    assert request.tags[INGEST_TAG] in (request.run_key or "")
