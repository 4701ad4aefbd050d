"""`dmr router`, in a project whose stages take no time but for the real release."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner, Result

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.cli.common import console
from dmr_pipeline.cli.router import router
from dmr_pipeline.defs import runs
from dmr_pipeline.release.comparison import CANDIDATE, RELEASED
from dmr_pipeline.release.history import Candidate, read_releases
from dmr_pipeline.stages import released_router as the_stage
from dmr_pipeline.stages.released_router import released_router
from dmr_pipeline.versioning import dvc_stages, lock_file
from tests.helpers.evaluations import make_episodes
from tests.helpers.fake_project import RECIPE, dvc, enter_project, fake_run

GRPO_ROUTER, RELEASED_ROUTER = Path("data/fake/grpo_router"), Path("data/fake/released_router")


def dmr_router(command: str, *arguments: str, recipe: str = RECIPE) -> Result:
    return CliRunner().invoke(router, [command, "--recipe", recipe, *arguments])


def train(context: StageContext) -> StageResult:
    """A router that is another one for each seed."""
    (context.output / "router").mkdir()
    (context.output / "router" / "router.json").write_text(str(context.recipe.grpo_router.seed))
    return fake_run(context)


def play_both(context: StageContext, released: Path, candidate: Candidate, number: int) -> pl.DataFrame:
    """Of eight games the candidate solves none, the released router six."""
    won = {CANDIDATE: np.zeros((1, 8)), RELEASED: np.arange(8)[None] < 6}
    success = {name: ("router", games) for name, games in won.items()}
    return make_episodes(success, {CANDIDATE: 0.1, RELEASED: 0.5}, {CANDIDATE: 0.25, RELEASED: 0.75})


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_project(folder, monkeypatch)
    made = {"grpo_router": train, "released_router": released_router}
    stages = tuple(replace(stage, run=made.get(stage.name, stage.run)) for stage in pipeline.STAGES)
    monkeypatch.setattr(pipeline, "STAGES", stages)
    monkeypatch.setattr(the_stage, "play_both", play_both)
    monkeypatch.setattr(console, "_width", 120)


@pytest.fixture(scope="module")
def trained_template(finished_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "project"
    shutil.copytree(finished_template, folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter(folder, monkeypatch)
        shutil.rmtree(RELEASED_ROUTER)
        for recorded in (dvc_stages.LOCK_FILE, lock_file.COPY):  # a history
            recorded.unlink()
        runs.materialize(pipeline.STAGES, RECIPE, ["grpo_router", "released_router"], force=True)
        recipe = Path("recipes/fake.yaml")
        recipe.write_text(recipe.read_text().replace("grpo_router:\n", "grpo_router:\n  seed: 1\n"))
        runs.materialize(pipeline.STAGES, RECIPE, ["grpo_router", "released_router"])
    return folder


@pytest.fixture
def trained(trained_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router of seed 0 is released; the one of seed 1 was trained after it, and rejected."""
    shutil.copytree(trained_template, tmp_path, dirs_exist_ok=True)
    enter(tmp_path, monkeypatch)


def seed_in_use() -> str:
    return (RELEASED_ROUTER / "router" / "router.json").read_text()


def decisions() -> list[str]:
    return [decision.decision for decision in read_releases(RELEASED_ROUTER).decisions]


def assert_recorded() -> None:
    """In DVC, and in Dagster as the artifact's version."""
    stage = pipeline.find_stage("released_router", pipeline.STAGES)
    artifact = verify(RELEASED_ROUTER)
    assert dvc_stages.is_committed(stage, RECIPE, artifact)
    with dg.DagsterInstance.get() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("released_router"))
    assert event is not None
    assert event.asset_materialization is not None
    assert event.asset_materialization.tags is not None
    assert artifact.hash in event.asset_materialization.tags.values()


def test_history_shows_every_decision_and_marks_the_one_in_use(trained: None) -> None:
    result = dmr_router("history")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    first, rejected = read_releases(RELEASED_ROUTER).decisions
    assert ["*", "1", first.router[:7], "first", "there", "was", "no", "release", "before"] in rows
    (shown,) = (row for row in rows if rejected.router[:7] in row)
    assert shown[:3] == ["2", rejected.router[:7], "rejected"]
    assert "-75.0" in shown
    assert "0.250" in shown
    assert "0.750)" in shown


def test_promote_releases_the_rejected_router_and_is_recorded(trained: None) -> None:
    assert (decisions(), seed_in_use()) == (["first", "rejected"], "0")
    result = dmr_router("promote")
    assert result.exit_code == 0, result.output
    assert "is in use, by decision 3" in result.output
    assert (decisions(), seed_in_use()) == (["first", "rejected", "promoted_by_hand"], "1")
    assert_recorded()


def test_rollback_restores_the_old_router_and_no_rerun_undoes_it(trained: None) -> None:
    first = read_releases(RELEASED_ROUTER).decisions[0]
    assert Candidate.of(GRPO_ROUTER).router != first.router, "its files are in DVC's cache alone"
    dmr_router("promote")
    result = dmr_router("rollback")
    assert result.exit_code == 0, result.output
    assert (decisions()[3:], seed_in_use()) == (["rolled_back"], "0")
    assert read_releases(RELEASED_ROUTER).decisions[3].router == first.router
    assert_recorded()
    assert {path.name for path in Path("data/fake").glob(".restored-*")} == set()
    assert (GRPO_ROUTER / "router" / "router.json").read_text() == "1", "what was trained last stays"

    before = verify(RELEASED_ROUTER).hash
    for force in (False, True):
        runs.materialize(pipeline.STAGES, RECIPE, ["released_router"], force=force)
        assert verify(RELEASED_ROUTER).hash == before
    assert "released_router" not in dvc("status")


def test_rollback_looks_in_the_recipes_remote(trained: None, tmp_path: Path) -> None:
    """A worker's image has it without calling it the default one."""
    dmr_router("promote")
    dvc("remote", "add", "volume", str(tmp_path / "volume"))
    shutil.copytree(".dvc/cache/files", tmp_path / "volume/files", dirs_exist_ok=True)
    shutil.rmtree(".dvc/cache/files")
    recipe = Path(f"recipes/{RECIPE}.yaml")
    recipe.write_text(recipe.read_text() + "versioning: {remote: volume}\n")
    result = dmr_router("rollback")
    assert result.exit_code == 0, result.output
    assert seed_in_use() == "0"


def test_rollback_to_a_number_takes_the_present_router_where_it_is_that_one(trained: None) -> None:
    dmr_router("promote")
    dmr_router("rollback", "--to", "1")
    shutil.rmtree(".dvc/cache/files")  # so that nothing could be restored
    result = dmr_router("rollback", "--to", "3")
    assert result.exit_code == 0, result.output
    assert seed_in_use() == "1"


def assert_one_line(result: Result, said: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_cannot_be_done_is_one_line_and_changes_nothing(trained: None) -> None:
    before = verify(RELEASED_ROUTER).hash
    assert_one_line(dmr_router("rollback"), "no earlier release")
    dmr_router("promote")
    after = verify(RELEASED_ROUTER).hash
    assert after != before
    assert_one_line(dmr_router("promote"), "in use already")
    assert_one_line(dmr_router("rollback", "--to", "2"), "decision 2 released no router")
    for command in ("history", "promote", "rollback"):
        assert_one_line(dmr_router(command, recipe="nope"), "unknown recipe 'nope'")
    assert verify(RELEASED_ROUTER).hash == after


def test_a_router_that_is_nowhere_is_one_line_and_changes_nothing(trained: None) -> None:
    dmr_router("promote")
    before = verify(RELEASED_ROUTER).hash
    shutil.rmtree(".dvc/cache/files")
    assert_one_line(dmr_router("rollback"), "is not in DVC's cache")
    assert verify(RELEASED_ROUTER).hash == before
    assert {path.name for path in Path("data/fake").glob(".restored-*")} == set()


def test_a_spoilt_or_missing_history_is_one_line(trained: None) -> None:
    path = RELEASED_ROUTER / "releases.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"current": 2}))
    assert_one_line(dmr_router("history"), "releases.json was changed")
    shutil.rmtree(RELEASED_ROUTER)
    for command in ("history", "rollback"):
        assert_one_line(dmr_router(command), "is missing: make it with `dmr materialize released_router --recipe fake")
