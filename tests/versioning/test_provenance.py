import io
import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder, sidecar_path
from dmr_pipeline.artifacts.manifest import MANIFEST, verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.artifacts.run_record import read_run_record
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.runtime import Runtime
from dmr_pipeline.versioning.provenance import trace
from tests.helpers.fake_project import RECIPE

TABLE = {stage.name: stage for stage in pipeline.STAGES}
APP = typer.Typer()
COMMAND = import_module("dmr_pipeline.cli.provenance")  # the package has the function under this name
APP.command()(COMMAND.provenance)
ROUTER = artifact_folder("grpo_router", RECIPE)
TASKS = artifact_folder("benchmark_tasks", RECIPE)


def ancestors(name: str) -> set[str]:
    return {name}.union(*(ancestors(upstream) for upstream in TABLE[name].inputs))


def shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the terminal shows, on lines that are not folded."""
    screen = io.StringIO()
    monkeypatch.setattr(COMMAND, "console", Console(file=screen, width=1000))
    done = CliRunner().invoke(APP, [str(path)])
    assert done.exit_code == 0, done.output
    return screen.getvalue()


def as_json(path: Path) -> dict[str, dict]:
    done = CliRunner().invoke(APP, [str(path), "--json"])
    assert done.exit_code == 0, done.output
    return {artifact["stage"]: artifact for artifact in json.loads(done.output)["artifacts"]}


def test_chain_is_the_tables_graph_above_the_artifact(finished_project: Recipe):
    chain = trace(ROUTER)
    assert next(iter(chain.origins)) == chain.stage == "grpo_router"
    assert set(chain.origins) == ancestors("grpo_router")
    assert not chain.problems
    for name, origin in chain.origins.items():
        assert origin.artifact.hash == verify(artifact_folder(name, RECIPE)).hash
        assert set(origin.artifact.manifest.inputs) == set(TABLE[name].inputs)


@pytest.mark.parametrize("inside", ["", MANIFEST, "content.json"])
def test_any_file_of_an_artifact_leads_to_it(finished_project: Recipe, inside: str, monkeypatch):
    assert trace(ROUTER / inside).stage == "grpo_router"
    monkeypatch.chdir(ROUTER)
    assert trace(Path(inside)).stage == "grpo_router"


def test_a_file_in_a_subfolder_leads_to_the_artifact(finished_project: Recipe):
    assert trace(artifact_folder("evaluation_report", RECIPE) / "plots" / "cost.png").stage == "evaluation_report"


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere", "nowhere does not exist"), ("recipes/fake.yaml", "belongs to no artifact")]
)
def test_other_paths_are_user_errors(finished_project: Recipe, path: str, message: str):
    with pytest.raises(UserError, match=message):
        trace(Path(path))
    done = CliRunner().invoke(APP, [path])
    assert done.exit_code == 2


def test_seeds_are_those_of_the_recipe(finished_project: Recipe):
    recipe = finished_project.model_dump(mode="json")

    def seeds_below(value: object, path: str = "") -> dict[str, object]:
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in seeds_below(inner, f"{path}.{key}").items()}
        return {path.lstrip("."): value} if path.endswith(".seed") else {}

    for name, origin in trace(artifact_folder("evaluation_report", RECIPE)).origins.items():
        assert origin.seeds() == seeds_below({section: recipe[section] for section in TABLE[name].sections})
    assert trace(ROUTER).origins["grpo_router"].seeds()["grpo_router.seed"] == finished_project.grpo_router.seed


def test_tree_shows_each_artifact_once_in_full(finished_project: Recipe, monkeypatch):
    text = shown(ROUTER, monkeypatch)
    for name in ancestors("grpo_router"):
        found = verify(artifact_folder(name, RECIPE)).hash
        assert text.count(f"{name} {found}, code version {TABLE[name].code_version}") == 1
    readers = [name for name in ancestors("grpo_router") if "benchmark_tasks" in TABLE[name].inputs]
    assert text.count(f"benchmark_tasks {verify(TASKS).hash} (above)") == len(readers) - 1
    assert "benchmark.seed 0" in text
    assert "threads 1, processes 2" in text
    assert "there is now" not in text
    assert "made elsewhere" not in text


def test_libraries_are_told_once_where_they_are_the_same_and_apart_where_not(finished_project: Recipe, monkeypatch):
    assert shown(ROUTER, monkeypatch).count("torch ") == 1
    sidecar = sidecar_path(TASKS)
    record = json.loads(sidecar.read_text())
    record["libraries"]["torch"] = "1.0.0"
    sidecar.write_text(json.dumps(record))
    text = shown(ROUTER, monkeypatch)
    assert "libraries that differ between the runs: torch 1.0.0\n" in text
    assert text.count("libraries that differ between the runs: torch ") == len(ancestors("grpo_router"))
    assert "torch" not in text.splitlines()[-1]
    assert "numpy" in text.splitlines()[-1]


def test_input_that_is_another_one_now_is_said(finished_project: Recipe, monkeypatch):
    used = verify(TASKS).hash
    changed = finished_project.model_copy(
        update={"benchmark": finished_project.benchmark.model_copy(update={"seed": 7})}
    )
    now = materialize_stage(pipeline.STAGES[0], changed).artifact.hash
    assert now != used
    text = shown(ROUTER, monkeypatch)
    assert f"was made from {used}, there is now {now}" in text
    assert "benchmark.seed 7" in text
    assert as_json(ROUTER)["grpo_router"]["inputs"]["benchmark_tasks"] == {"used": used, "now": now}


def test_missing_and_damaged_inputs_are_said(finished_project: Recipe, monkeypatch):
    used = verify(TASKS).hash
    shutil.rmtree(TASKS)
    (artifact_folder("kl_router", RECIPE) / "content.json").write_text("{}")
    text = shown(ROUTER, monkeypatch)
    assert f"was made from {used}, there is none now" in text
    assert "benchmark_tasks is missing" in text
    assert "kl_router/content.json was changed" in text
    assert set(json.loads(CliRunner().invoke(APP, [str(ROUTER), "--json"]).output)["problems"]) == {
        "benchmark_tasks",
        "kl_router",
    }


@pytest.mark.parametrize("record", [None, "of another artifact", "malformed"])
def test_artifact_without_its_own_record_was_made_elsewhere(finished_project: Recipe, record: str | None, monkeypatch):
    sidecar = sidecar_path(ROUTER)
    content = json.loads(sidecar.read_text())
    sidecar.unlink()
    if record is not None:
        sidecar.write_text(json.dumps({**content, "hash": "0.dir"}) if record == "of another artifact" else "{")
    assert read_run_record(verify(ROUTER)) is None
    assert shown(ROUTER, monkeypatch).count("made elsewhere: no record of the run") == 1
    assert as_json(ROUTER)["grpo_router"]["run"] is None


def test_record_is_of_the_run(project: Recipe, monkeypatch: pytest.MonkeyPatch):
    commit = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-q", "-m", "start"]
    Path("dvc.lock").write_text("schema: '2.0'\n")
    subprocess.run(["git", "add", "dvc.yaml", "dvc.lock"], check=True)
    subprocess.run(commit, check=True)
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")  # as earlier stages do
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    artifact = materialize_stage(pipeline.STAGES[0], project, run_id="some-run").artifact
    run = read_run_record(artifact)
    assert run is not None
    assert (run.hash, run.run_id, run.runtime) == (artifact.hash, "some-run", project.runtime)
    assert run.git is not None
    assert (run.git.commit, run.git.clean) == (head, True)
    assert run.peak_bytes is not None
    assert run.peak_bytes > 10_000_000
    assert "some-run" not in (artifact.path / MANIFEST).read_text()
    text = shown(TASKS, monkeypatch)
    assert f"git {head}\n" in text
    assert f"{run.finished:%Y-%m-%d %H:%M} UTC in {run.seconds:.1f} s, run some-run" in text
    Path("dvc.yaml").write_text("changed")
    materialize_stage(pipeline.STAGES[0], project, force=True)
    assert f"git {head} with uncommitted changes" in shown(TASKS, monkeypatch)


@pytest.mark.parametrize(
    ("device", "used", "expected"),
    [("auto", True, "Some GPU, CUDA 12.8"), ("auto", False, None), ("cpu", True, None)],
)
def test_device_is_the_gpu_only_where_the_run_computed_on_it(
    project: Recipe, monkeypatch: pytest.MonkeyPatch, device: str, used: bool, expected: str | None
):
    cuda = SimpleNamespace(
        is_initialized=lambda: used,
        get_device_name=lambda: "Some GPU",
        max_memory_allocated=lambda: 5_000,
        reset_peak_memory_stats=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.8")))
    recipe = project.model_copy(update={"runtime": Runtime(device=device)})
    run = read_run_record(materialize_stage(pipeline.STAGES[0], recipe).artifact)
    assert run is not None
    if expected is None:
        assert (run.device.name, run.device.cuda, run.peak_gpu_bytes) == (run.machine.cpu, None, None)
    else:
        assert f"device: {expected};" in shown(TASKS, monkeypatch)
        assert run.peak_gpu_bytes == 5_000
