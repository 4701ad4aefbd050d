"""Dagster's daemon on a fake project: what is dropped is ingested once and retrained on once, whatever is killed."""

import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import yaml
from dagster._core.definitions.run_request import InstigatorType  # not exported
from dagster._core.scheduler.instigation import InstigatorTick

from dmr_pipeline.artifacts.folders import artifact_folder, incoming_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.defs import runs
from dmr_pipeline.defs.automation import UNFINISHED
from dmr_pipeline.ingestion.schema import EXAMPLE
from dmr_pipeline.ingestion.stored import STAGE
from dmr_pipeline.recipe.reading import RECIPE_FOLDER
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.dagster_processes import SCRIPTS, enter_dagster_project, running, wait_until
from tests.helpers.fake_project import RECIPE
from tests.helpers.location import stages

BEFORE = ["benchmark_tasks", "agent", "quantized_checkpoints", "trajectories", STAGE, "sensitivity_dataset"]
"""What there is before the first file is dropped."""


def evaluations(instance: dg.DagsterInstance, sensor: str) -> list[InstigatorTick]:
    """Those of the sensor that have ended, the last first."""
    for state in instance.all_instigator_state(instigator_type=InstigatorType.SENSOR):
        if state.instigator_name == sensor:
            ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id)
            return [tick for tick in ticks if tick.end_timestamp]
    return []


def settled(instance: dg.DagsterInstance, reason: str) -> Callable[[], bool]:
    """Whether no run is left, and the sensor sees nothing to do for this reason."""

    def condition() -> bool:
        ticks = evaluations(instance, "new_trajectories")
        said = bool(ticks) and ticks[0].skip_reason == f"{RECIPE}: {reason}"
        return said and not instance.get_runs(dg.RunsFilter(statuses=UNFINISHED))

    return condition


def drop(name: str, **episode: object) -> str:
    """As people are told to, whole or not at all; returns the name that the file is filed away under."""
    incoming = incoming_folder(RECIPE)
    incoming.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**EXAMPLE, **episode}).encode() + b"\n"
    (incoming / f"{name}.part").write_bytes(content)
    (incoming / f"{name}.part").rename(incoming / name)
    return f"{hashlib.sha256(content).hexdigest()[:12]}-{name}"


def ingested_ids() -> list[str]:
    """Read without any code of ours."""
    files = (artifact_folder(STAGE, RECIPE) / "episodes").glob("*.parquet")
    return sorted(episode for file in files for episode in pl.read_parquet(file)["episode_id"])


def recorded_hash(stage: str) -> str:
    lock = yaml.safe_load(dvc_stages.LOCK_FILE.read_text())
    return str(lock["stages"][f"{stage}@{RECIPE}"]["outs"][0]["md5"])


@pytest.mark.slow
def test_daemon_ingests_and_retrains_exactly_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_dagster_project(tmp_path, monkeypatch)
    with (RECIPE_FOLDER / f"{RECIPE}.yaml").open("a") as recipe:
        recipe.write("retraining: {min_new_steps: 2}\n")
    runs.materialize(stages(), RECIPE, BEFORE)
    incoming, daemon = incoming_folder(RECIPE), ("dagster-daemon", "run", "-w", "workspace.yaml")
    with dg.DagsterInstance.get() as instance:
        earlier = {run.run_id for run in instance.get_runs()}

        with running(*daemon):
            good = drop("good.jsonl", episode_id="good")
            wait_until(
                lambda: len(evaluations(instance, "recipe_files")) == 2, "the other sensor, which is on, goes on"
            )
            assert (incoming / "good.jsonl").is_file()
            assert not evaluations(instance, "new_trajectories"), "the sensor is on, but nobody has started it"

            start = ["dagster", "sensor", "start", "new_trajectories", "-w", "workspace.yaml"]
            subprocess.run([SCRIPTS / start[0], *start[1:]], check=True, capture_output=True)
            wait_until((incoming / "ingested" / good).is_file, "the good file is ingested")
            bad = drop("bad.jsonl", episode_id="bad", task_id="test-game")
            wait_until((incoming / "quarantine" / bad).is_file, "the bad file is quarantined")
            reason = (incoming / "quarantine" / f"{bad}.reason.txt").read_text()
            assert "episode 'bad': its game test-game is held out, in the split test" in reason
            wait_until(settled(instance, "0 new steps of the 2 that start a retraining"), "the retraining has ended")
        # The daemon and all that it had started were killed.
        later = drop("later.jsonl", episode_id="later", steps=EXAMPLE["steps"][:1])
        with running(*daemon):
            wait_until(settled(instance, "1 new steps of the 2 that start a retraining"), "the later file is ingested")

        started = Counter((run.job_name, run.status) for run in instance.get_runs() if run.run_id not in earlier)
    success = dg.DagsterRunStatus.SUCCESS
    assert started == {("ingest", success): 3, ("retrain", success): 1}  # a run for each file: they came one by one
    assert sorted(path.name for path in (incoming / "ingested").iterdir()) == sorted([good, later])
    assert not [path for path in incoming.iterdir() if path.is_file()]
    assert ingested_ids() == ["good", "later"]
    for stage in (STAGE, "released_router"):
        assert recorded_hash(stage) == verify(artifact_folder(stage, RECIPE)).hash
