import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
from typer.testing import Result

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.cli.stages import stage_states
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from tests.helpers.commands import dmr
from tests.helpers.fake_project import RECIPE, REPOSITORY, SUMMARIES, commit_agent, dvc

pytestmark = pytest.mark.usefixtures("fake_report")

HEAVY = ("torch", "transformers", "trl", "great_expectations", "matplotlib")


def test_run_makes_everything_once_and_the_second_run_does_nothing(project: Recipe):
    first = dmr("run", RECIPE)
    assert first.exit_code == 0, first.output
    for stage in pipeline.STAGES:
        assert f"{stage.name}: done" in first.output
    assert "report.html" in first.output
    assert "up to date" in dvc("status")

    second = dmr("run", RECIPE)
    assert second.exit_code == 0
    assert "nothing to do" in second.output


def test_ladder_makes_what_it_shows_and_no_more(project: Recipe):
    refused = dmr("ladder", RECIPE, "--json")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "dmr materialize quantized_checkpoints" in refused.stderr
    shown = dmr("ladder", RECIPE)
    assert shown.exit_code == 0, shown.output
    assert {stage.name for stage in pipeline.STAGES if f"{stage.name}: done" in shown.output} == {
        "benchmark_tasks", "agent", "quantized_checkpoints",
    }  # fmt: skip
    for said in ("50.0% (40-60)", "Routing can pay.", "Success on 4 validation games, 95% intervals"):
        assert said in shown.output
    assert "up to date" not in dmr("ladder", RECIPE).output, (
        "no run is started, which could have to wait for another one"
    )
    told = dmr("ladder", RECIPE, "--json")
    facts = json.loads(told.stdout)
    assert [rung["name"] for rung in facts["rungs"]] == facts["route"] == ["float", "int2"]
    assert facts["verdict"]["pays"] is True
    assert dmr("run", RECIPE).output.count("verdict: Routing can pay.") == 1


def test_a_ladder_that_no_router_can_help_names_the_weights_to_deploy(project: Recipe, monkeypatch: pytest.MonkeyPatch):
    verdict = {"pays": False, "route": ["int2"], "deploy": "int2", "drafter": "", "text": "Routing cannot pay."}
    monkeypatch.setitem(SUMMARIES, "quantized_checkpoints", SUMMARIES["quantized_checkpoints"] | {"verdict": verdict})
    shown = dmr("ladder", RECIPE).output
    assert "Its weights: data/fake/quantized_checkpoints/int2" in shown
    assert "verdict: Routing cannot pay. (data/fake/quantized_checkpoints/int2)" in dmr("run", RECIPE).output


@pytest.mark.parametrize(
    ("command", "stage"),
    [(("report", RECIPE), "evaluation_report"), (("ladder", RECIPE, "--json"), "quantized_checkpoints")],
)
def test_what_another_code_version_has_made_is_one_line(
    finished_project: Recipe, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], stage: str
):
    newer = [replace(s, code_version="99") if s.name == stage else s for s in pipeline.STAGES]
    monkeypatch.setattr(pipeline, "STAGES", tuple(newer))
    refused = dmr(*command)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert f"data/fake/{stage} was made by code version" in refused.stderr
    assert "this is 99: make it again with `dmr run fake`" in refused.stderr


@pytest.mark.parametrize("damage", ["stage deleted", "recipe changed", "dvc.lock lost"])
def test_run_does_only_what_is_not_up_to_date(finished_project: Recipe, damage: str):
    if damage == "stage deleted":
        shutil.rmtree("data/fake/evaluation_report")
    if damage == "recipe changed":
        recipe = Path("recipes/fake.yaml")
        recipe.write_text(recipe.read_text().replace("evaluation: {}", "evaluation: {seed: 5}"))
    if damage == "dvc.lock lost":
        Path("dvc.lock").unlink()
    again = dmr("run", RECIPE)
    assert again.exit_code == 0, again.output
    done = {stage.name for stage in pipeline.STAGES if f"{stage.name}: done" in again.output}
    assert done == (set() if damage == "dvc.lock lost" else {"evaluation_report"})
    assert "nothing to do" not in again.output
    assert "up to date" in dvc("status")


def test_a_clone_starts_from_the_committed_agent_and_ends_with_the_same_hashes(
    finished_project: Recipe, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    """It was in DVC's cache before, under DVC's other name, as `dvc.lock` still says."""
    commit_agent(monkeypatch)
    assert dmr("run", RECIPE).exit_code == 0
    agent = Path("data/fake/agent")
    before = verify(agent)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], check=True)
    clone = tmp_path_factory.mktemp("clone")
    subprocess.run(["git", "clone", "-q", ".", str(clone)], check=True)
    monkeypatch.chdir(clone)
    monkeypatch.setenv("DAGSTER_HOME", str(clone / "dagster_home"))
    assert [path.name for path in Path("data/fake").iterdir()] == ["agent"], "nothing else is in Git"

    result = dmr("run", RECIPE)
    assert result.exit_code == 0, result.output
    assert "agent: up to date" in result.output
    assert verify(agent) == before
    assert "up to date" in dvc("status")
    changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    assert [line for line in changes.splitlines() if "dagster_home" not in line] == []


def test_report_as_json_is_json_alone(finished_project: Recipe):
    result = dmr("report", RECIPE, "--json")
    report = json.loads(result.stdout)
    assert report.keys() == {"recipe", "route", "high", "low", "headline", "policies", "paired", "html"}
    assert Path(report["html"]).read_text() == "evaluation_report"
    assert "policies of fake" in dmr("report", RECIPE).stdout


def test_status_tells_present_stale_damaged_and_missing(finished_project: Recipe):
    Path("data/fake/kl_router/content.json").write_text("{}")
    shutil.rmtree("data/fake/agent")
    recipe = Path("recipes/fake.yaml")
    recipe.write_text(recipe.read_text().replace("sensitivity: {quantile: 0.5}", "sensitivity: {quantile: 0.4}"))
    states = {name: state for name, state, _, _ in stage_states(load_recipe(RECIPE))}
    assert states == {
        "benchmark_tasks": "present",
        "agent": "missing",
        "quantized_checkpoints": "stale",
        "trajectories": "stale",
        "ingested_trajectories": "present",
        "sensitivity_dataset": "stale",
        "kl_router": "damaged",
        "grpo_router": "stale",
        "evaluation_report": "stale",
        "released_router": "stale",
    }
    shown = dmr("status", RECIPE)
    assert shown.exit_code == 0
    assert all(word in shown.output for word in ("present", "stale", "damaged", "missing"))


def test_render_check_exits_1_until_rendered(project: Recipe):
    assert dmr("render", "--check").exit_code == 0
    Path("recipes/other.yaml").write_text(Path("recipes/fake.yaml").read_text())
    before = Path("dvc.yaml").read_text()
    assert dmr("render", "--check").exit_code == 1
    assert Path("dvc.yaml").read_text() == before
    assert dmr("render").exit_code == 0
    Path("data/.gitignore").write_text("/*\n")
    assert "data/.gitignore: not what" in dmr("render", "--check").stderr
    assert dmr("render").exit_code == 0
    assert dmr("render", "--check").exit_code == 0
    assert "cached_agent@other" in dvc("stage", "list", "--name-only")


def raise_user_error(context: StageContext) -> StageResult:
    (context.output / "half").write_text("half")
    raise UserError("no such game folder: games/: set ALFWORLD_DATA")


def write_pickle(context: StageContext) -> StageResult:
    (context.output / "model.pkl").write_bytes(b"")
    return StageResult({})


def fill_disk(context: StageContext) -> StageResult:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nope"), "unknown recipe 'nope'.*known recipes: fake"),
        (("report", "nope"), "unknown recipe 'nope'"),
        (("status", "nope"), "unknown recipe 'nope'"),
        (("materialize", "agent"), "unknown recipe 'alfworld-tiny'"),
        (("materialize", "nope", "--recipe", RECIPE), "unknown stage 'nope'.*benchmark_tasks"),
        (("materialize", "agent", "--recipe", RECIPE), "benchmark_tasks is missing.*dmr materialize benchmark_tasks"),
        (("materialize", "agent", "--recipe", RECIPE, "--code-version", "0"), "code version 2, not 0.*dmr render"),
        (("report", RECIPE, "--json"), "evaluation_report is missing.*dmr materialize evaluation_report"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(project: Recipe, arguments: tuple[str, ...], said: str):
    assert_one_line(dmr(*arguments), said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("benchmark: [", "not valid YAML"),
        ("- a list", "a recipe is a mapping"),
        ("benchmark: {}", "recipes/fake.yaml: benchmark.splits: Field required .and 7 more: `dmr recipe check fake`"),
        (
            "benchmark: {environment: mars}",
            "recipes/fake.yaml: benchmark.environment: .*'alfworld-official'.* \\(it is 'mars'\\)",
        ),
        ("colour: red", "colour: Extra inputs are not permitted"),
    ],
)
def test_malformed_recipe_is_one_line_and_exit_code_2(project: Recipe, text: str, said: str):
    Path("recipes/fake.yaml").write_text(text)
    assert_one_line(dmr("run", RECIPE), said)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (raise_user_error, "no such game folder: games/: set ALFWORLD_DATA"),
        (write_pickle, "no pickles, found model.pkl"),
        (fill_disk, "no space left on the disk"),
    ],
)
def test_trouble_inside_a_run_is_one_line_and_leaves_nothing_half_written(
    project: Recipe, monkeypatch: pytest.MonkeyPatch, run: Callable[[StageContext], StageResult], said: str
):
    monkeypatch.setattr(pipeline, "STAGES", (replace(pipeline.STAGES[0], run=run), *pipeline.STAGES[1:]))
    for command in (("run", RECIPE), ("materialize", "benchmark_tasks", "--recipe", RECIPE)):
        assert_one_line(dmr(*command), said)
        assert [path.name for path in Path("data/fake").iterdir() if path.is_dir()] == []


def assert_one_line(result: Result, said: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.search(said, result.stderr), result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


def test_outside_of_a_project_the_line_says_where_to_go(project: Recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAGSTER_HOME", str(Path("nowhere").resolve()))
    assert_one_line(dmr("run", RECIPE), "DAGSTER_HOME is .*nowhere, which is no folder")


@pytest.mark.parametrize("code", ["dmr --help", "import dmr_pipeline.definitions as d; d.defs()"])
def test_help_and_code_location_import_nothing_heavy(project: Recipe, code: str):
    if code == "dmr --help":
        code = (
            "from typer.testing import CliRunner; from dmr_pipeline.cli import app; CliRunner().invoke(app, ['--help'])"
        )
    code += f"\nimport sys; print(sorted({set(HEAVY)} & sys.modules.keys()))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


KILLED = """
import os, signal, sys
from dataclasses import replace
from dmr_pipeline import pipeline
from dmr_pipeline.cli import app
from tests.helpers.fake_project import fake_run, fake_stages

def run(context):
    half = context.scratch / "half"
    if not half.exists():
        half.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    print("resumed")
    return fake_run(context)

pipeline.STAGES = tuple(replace(stage, run=run) if stage.name == "agent" else stage for stage in fake_stages())
app(["materialize", "agent", "--recipe", "fake"])
"""


def test_a_killed_run_is_resumed_and_its_pool_slot_is_freed(project: Recipe):
    """The killed process held the only slot of the pool `gpu`: were it not freed, the second run would wait forever."""
    assert dmr("materialize", "benchmark_tasks", "--recipe", RECIPE).exit_code == 0
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", KILLED]
    killed = subprocess.run(command, check=False, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not Path("data/fake/agent").exists()
    resumed = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=60)
    assert "resumed" in resumed.stdout
    unbroken = verify(Path("data/fake/agent")).hash
    assert dmr("materialize", "agent", "--recipe", RECIPE, "--force").exit_code == 0
    assert verify(Path("data/fake/agent")).hash == unbroken
    with dg.DagsterInstance.get() as instance:
        statuses = [run.status for run in instance.get_runs()]
    assert statuses.count(dg.DagsterRunStatus.FAILURE) == 1
    assert statuses.count(dg.DagsterRunStatus.SUCCESS) == 3
