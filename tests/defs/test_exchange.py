"""Two machines: each its own checkout, working folder and DVC cache; shared are Dagster's instance and a DVC remote."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock

import dagster as dg
import pytest
from typer.testing import CliRunner

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import hash_files, verify
from dmr_pipeline.cli import app
from dmr_pipeline.defs import exchange, runs
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.schema import EXAMPLE
from dmr_pipeline.summaries import IngestedSummary
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import RECIPE, commit_agent, dvc, enter_project, make_project

NAMES = [stage.name for stage in pipeline.STAGES]
INGESTION = pipeline.find_stage("ingested_trajectories", pipeline.STAGES)
"""The real one."""


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two checkouts of one fake project; the first is the working directory."""
    store = tmp_path / "store"
    folders = {name: tmp_path / name for name in ("first", "second")}
    for folder in folders.values():
        folder.mkdir()
        make_project(folder, pipeline.STAGES)
        enter_project(folder, monkeypatch)
        dvc("remote", "add", "store", str(store))
        recipe = Path(f"recipes/{RECIPE}.yaml")
        recipe.write_text(recipe.read_text() + "versioning: {remote: store}\n")
    work_on(folders["first"], folders, monkeypatch)
    return folders


def work_on(folder: Path, machines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    enter_project(folder, monkeypatch)
    monkeypatch.setenv("DAGSTER_HOME", str(machines["first"] / "dagster_home"))


def test_a_worker_pulls_its_inputs_by_hash_and_the_other_machine_gets_what_it_made(
    machines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    runs.materialize(pipeline.STAGES, RECIPE, NAMES[: NAMES.index("grpo_router")])
    inputs = pipeline.find_stage("grpo_router", pipeline.STAGES).inputs
    made = {name: hash_files(artifact_folder(name, RECIPE)) for name in inputs}

    work_on(machines["second"], machines, monkeypatch)
    assert not artifact_folder("kl_router", RECIPE).exists()
    stale = artifact_folder("quantized_checkpoints", RECIPE)
    stale.mkdir(parents=True)
    (stale / "of_yesterday").write_text("x")
    runs.materialize(pipeline.STAGES, RECIPE, ["grpo_router"])
    assert {name: hash_files(artifact_folder(name, RECIPE)) for name in inputs} == made
    router = verify(artifact_folder("grpo_router", RECIPE))

    work_on(machines["first"], machines, monkeypatch)
    result = CliRunner().invoke(app, ["pull", RECIPE])
    assert result.exit_code == 0, result.output
    here = verify(artifact_folder("grpo_router", RECIPE))
    assert here.hash == router.hash
    assert dvc_stages.is_committed(pipeline.find_stage("grpo_router", pipeline.STAGES), RECIPE, here)


def test_an_agent_that_git_carries_is_not_exchanged(machines: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    commit_agent(monkeypatch)
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks", "agent"])
    work_on(machines["second"], machines, monkeypatch)
    commit_agent(monkeypatch)
    with pytest.raises(UserError, match=r"data/fake/agent is not .*\.dir, which is in use: it lies in Git"):
        runs.materialize(pipeline.STAGES, RECIPE, ["quantized_checkpoints"])
    shutil.copytree(machines["first"] / "data/fake/agent", "data/fake/agent")
    runs.materialize(pipeline.STAGES, RECIPE, ["quantized_checkpoints"])


def test_a_clone_whose_instance_is_new_goes_on_with_the_history_of_dvc_lock(
    machines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    """The remote has its objects, and nobody but dvc.lock says which."""
    stages = tuple(INGESTION if stage.name == INGESTION.name else stage for stage in pipeline.STAGES)
    incoming = Path("data/incoming") / RECIPE
    incoming.mkdir(parents=True)
    (incoming / "one.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    runs.materialize(stages, RECIPE, ["benchmark_tasks", INGESTION.name])
    before = verify(artifact_folder(INGESTION.name, RECIPE))
    assert before.manifest.summary["episodes"] == 1

    shutil.copyfile("dvc.lock", machines["second"] / "dvc.lock")
    enter_project(machines["second"], monkeypatch)
    monkeypatch.setenv("DAGSTER_HOME", str(machines["second"] / "dagster_home"))
    runs.materialize(stages, RECIPE, ["benchmark_tasks", INGESTION.name])
    assert verify(artifact_folder(INGESTION.name, RECIPE)).hash == before.hash


def drop(name: str) -> Path:
    incoming = Path("data/incoming") / RECIPE
    incoming.mkdir(parents=True, exist_ok=True)
    (incoming / f"{name}.jsonl").write_text(json.dumps({**EXAMPLE, "episode_id": name}) + "\n")
    return incoming / f"{name}.jsonl"


def ingest() -> int:
    """Returns the number of episodes that there are."""
    stages = tuple(INGESTION if stage.name == INGESTION.name else stage for stage in pipeline.STAGES)
    if not artifact_folder("benchmark_tasks", RECIPE).is_dir():
        runs.materialize(stages, RECIPE, ["benchmark_tasks"])
    runs.materialize(stages, RECIPE, [INGESTION.name])
    summary = verify(artifact_folder(INGESTION.name, RECIPE)).manifest.summary
    return IngestedSummary.model_validate(summary).episodes


def break_off_a_push(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `two` holds is ingested, and a run dies before that is sent to the remote and recorded."""
    dropped = drop("two")
    with monkeypatch.context() as patched:
        patched.setattr(exchange, "push", Mock(side_effect=UserError("no route to the remote")))
        with pytest.raises(UserError, match="no route"):
            ingest()
    assert not dropped.exists()


def test_what_was_ingested_outlives_a_push_that_fails(
    machines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop("one")
    assert ingest() == 1
    break_off_a_push(monkeypatch)
    with pytest.raises(
        UserError, match=r"ingested_trajectories has grown here, .*`dmr materialize ingested_trajectories"
    ):
        runs.materialize(
            pipeline.STAGES, RECIPE, ["agent", "quantized_checkpoints", "trajectories", "sensitivity_dataset"]
        )
    assert ingest() == 2
    work_on(machines["second"], machines, monkeypatch)
    assert ingest() == 2, "it comes from the remote"


def test_a_history_that_grew_on_two_machines_is_not_chosen_from(
    machines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop("one")
    assert ingest() == 1
    break_off_a_push(monkeypatch)
    work_on(machines["second"], machines, monkeypatch)
    drop("three")
    assert ingest() == 2
    work_on(machines["first"], machines, monkeypatch)
    with pytest.raises(UserError, match="and on another machine since"):
        ingest()
    shutil.rmtree(artifact_folder(INGESTION.name, RECIPE))
    drop("two")
    assert ingest() == 3


def test_inside_dvc_repro_nothing_is_exchanged(machines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC records the stage once its command has ended: before, there is nothing to send."""
    monkeypatch.setenv("DVC_STAGE", "benchmark_tasks@fake")
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks"])
    assert not (machines["first"].parent / "store").exists()
    monkeypatch.delenv("DVC_STAGE")
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks"])
    assert any((machines["first"].parent / "store").rglob("*.dir"))


def test_pull_needs_a_remote(machines: dict[str, Path]):
    recipe = Path(f"recipes/{RECIPE}.yaml")
    recipe.write_text(recipe.read_text().replace("versioning: {remote: store}\n", ""))
    result = CliRunner().invoke(app, ["pull", RECIPE])
    assert result.exit_code == 2


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout


def test_what_is_materialised_becomes_commits_on_a_branch_of_its_own(project: object):
    recipe = Path(f"recipes/{RECIPE}.yaml")
    recipe.write_text(recipe.read_text() + "versioning: {git: commit}\n")
    git("add", "-A")
    git("commit", "-qm", "start")
    head = git("rev-parse", "HEAD")
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks", "agent"])
    (branch,) = re.findall(r"retrain/\d{4}-\d\d-\d\d", git("branch", "--list", "retrain/*"))
    assert git("log", "--format=%s", f"HEAD..{branch}").splitlines() == [
        f"cached_agent@{RECIPE} is {verify(artifact_folder('agent', RECIPE)).hash}",
        f"benchmark_tasks@{RECIPE} is {verify(artifact_folder('benchmark_tasks', RECIPE)).hash}",
    ]
    assert git("show", f"{branch}:dvc.lock") == Path("dvc.lock").read_text()
    assert git("rev-parse", "HEAD") == head
    assert git("diff", "--cached", "--name-only") == "", "nothing is staged in the checkout"
    with dg.DagsterInstance.get() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("agent"))
    assert event is not None
    assert event.asset_materialization is not None
    assert event.asset_materialization.metadata["git_commit"].value == git("rev-parse", branch).strip()


def test_a_run_refuses_an_input_whose_manifest_is_not_the_recorded_one(finished_project: object):
    manifest = artifact_folder("trajectories", RECIPE) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"inputs": 2', '"inputs": 3'))
    verify(manifest.parent)
    with pytest.raises(UserError, match=r"data/fake/trajectories is .*, but dvc\.lock records"):
        runs.materialize(pipeline.STAGES, RECIPE, ["sensitivity_dataset"], force=True)
