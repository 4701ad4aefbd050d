"""Every real stage on a recipe of a few games and an agent that has learned nothing: it must run, and repeat itself."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder, sidecar_path
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.environments.benchmark import benchmark_of, split_seeds
from dmr_pipeline.evaluation.results import POLICIES
from dmr_pipeline.precision.ladder import read_ladder
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.kl import ROUTER_FOLDER
from tests.helpers.fake_project import REPOSITORY, make_project
from tests.helpers.installed_dmr import dmr
from tests.helpers.micro_recipe import RECIPE_YAML, THREE_RUNGS_YAML

LADDER = ["float", "int4", "int2"]
STUDY = """
recipe: micro
games: 6
seeds: [0, 1]
budgets: [0.2, 0.5]
planned: [0.5]
routers:
  kl: {}
  after: {stage: grpo_router, changes: {kl_router: {model: {decides: after}}}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.fake_project.RECIPE_YAML", RECIPE_YAML)
        patch.setattr("tests.helpers.fake_project.RECIPE", "micro")
        make_project(folder, pipeline.STAGES)
    return folder


def assert_the_rung_acted_alone(cost: float) -> None:
    """As where int4 is the cheapest of two routed rungs, and acts throughout."""
    recipe = load_recipe("micro")
    rollouts = Rollouts.load(artifact_folder("quantized_checkpoints", "micro"), recipe, ("float", "int4"))
    games = benchmark_of(recipe.benchmark).read_tasks(artifact_folder("benchmark_tasks", "micro"), "test")
    played = rollouts.play([RolloutRequest(game) for game in games], SinglePrecision("int4", rollouts.route), seed=0)
    assert cost == pytest.approx(sum(rollouts.cost(episode).total for episode in played) / len(played), abs=1e-6)


def test_the_whole_pipeline_runs_and_repeats_itself(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("DAGSTER_HOME", str(project / "dagster_home"))
    first = dmr("run", "micro")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "always_high" in first.stdout
    assert "report.html" in first.stdout

    report = json.loads(dmr("report", "micro", "--json").stdout)
    policies = report["policies"]
    assert set(policies) == POLICIES | {"always_int4", "speculative:float<int2"}
    assert all(policy["spend"] == policy["high_ratio"] for policy in policies.values())
    assert all(policy["n"] == 4 for policy in policies.values())
    assert (policies["always_high"]["high_ratio"], policies["always_int4"]["high_ratio"]) == (1.0, 0.0)
    assert policies["random@kl_router"]["episodes"] == 12
    checked, written = policies["speculative:float<int2"], policies["always_high"]
    assert (checked["success"], checked["steps"]) == (written["success"], written["steps"])
    assert checked["acting_passes"] < written["acting_passes"]
    assert 0 < checked["accepted"] <= 1
    record = json.loads(sidecar_path(artifact_folder("evaluation_report", "micro")).read_text())
    assert record["measured"]["seconds_per_step"]["speculative:float<int2"]["mean"] > 0
    assert_the_rung_acted_alone(report["policies"]["always_int4"]["cost"])
    page = Path(report["html"]).read_text()
    assert page.count("data-chart=") >= 12
    assert "4 of 4 test games" in page

    again = dmr("run", "micro")
    assert "nothing to do" in again.stdout

    hashes = {stage.name: verify(artifact_folder(stage.name, "micro")).hash for stage in pipeline.STAGES}
    for name in ("agent", "sensitivity_dataset", "grpo_router", "evaluation_report"):
        done = dmr("materialize", name, "--recipe", "micro", "--force")
        assert done.returncode == 0, done.stdout + done.stderr
        assert verify(artifact_folder(name, "micro")).hash == hashes[name], name
    assert_a_study_trains_what_differs_and_plays_all_of_it(hashes["kl_router"])


def assert_a_study_trains_what_differs_and_plays_all_of_it(kl_router: str) -> None:
    Path("small.yaml").write_text(STUDY)
    done = dmr("study", "run", "small.yaml", "--out", "results/small.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "against the best rule" in done.stdout
    folder = Path("data/scratch/studies/small")
    routers = folder / "artifacts"
    assert verify(artifact_folder("kl_router", "kl-0", routers)).hash == kl_router
    linked = artifact_folder("kl_router", "kl-0", routers) / "manifest.json"
    assert linked.samefile(artifact_folder("kl_router", "micro") / "manifest.json")
    hashes = {name: verify(artifact_folder("kl_router", name, routers)).hash for name in ("kl-0", "kl-1", "after-0")}
    assert len(set(hashes.values())) == 3
    assert not artifact_folder("grpo_router", "kl-0", routers).exists()
    verify(artifact_folder("grpo_router", "after-1", routers))

    results = json.loads(Path("results/small.json").read_text())
    assert results == json.loads((folder / "results.json").read_text())
    points = {(point["policy"], point["budget"]): point for point in results["points"]}
    assert {policy for policy, budget in points if budget is None} == {
        "always_float", "always_int4", "always_int2", "speculative:float<int2", "disagreement",
    }  # fmt: skip
    tuned = {policy for policy, budget in points if budget is not None}
    assert {"kl", "after", "rule:random", "rule:margin"} < tuned
    assert {(policy, budget) for policy in tuned for budget in (0.2, 0.5)} < points.keys()
    assert len(points["kl", 0.2]["by_seed"]) == len(points["after", 0.5]["by_seed"]) == 2
    assert [(one["router"], one["budget"]) for one in results["compared"]] == [("kl", 0.5), ("after", 0.5)]
    episodes = pl.read_parquet(folder / "episodes.parquet")
    assert episodes.group_by("policy", "budget", "seed").len()["len"].to_list() == [6] * (
        5 + 2 * (len(tuned) - 2) + 2 * 2 * 2
    )
    kept = folder.with_name(".kept")
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    again = dmr("study", "run", "small.yaml", "--json")
    assert json.loads(again.stdout) == results
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before

    longest = episodes["steps"].max()
    assert longest > 2
    Path("leash.yaml").write_text("recipe: micro\ngames: 6\nbudgets: [0.5]\nrules: [margin]\nstep_limit: 2\n")
    Path("docs").mkdir()
    Path("docs/leash.md").write_text("<!-- dmr study leash: table -->\n<!-- end -->\n")
    done = dmr("study", "run", "leash.yaml", "--markdown")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "docs/leash.md written" in done.stdout
    assert "| rule:margin | 0.5 |" in Path("docs/leash.md").read_text()
    short = pl.read_parquet("data/scratch/studies/leash/episodes.parquet")
    assert short.filter(policy="rule:margin").height == 6
    assert short["steps"].max() == 2
    assert_other_games_are_played_at_what_was_tuned_before()
    assert_another_ladder_is_made_for_a_study()


def assert_other_games_are_played_at_what_was_tuned_before() -> None:
    """The test games of another benchmark, with its step limit; by a router that another study has trained."""
    other = "{environment: alfworld, seed: 7, step_limit: 9, splits: {agent_train: 1, router_train: 1, validation: 1, test: 5}}"
    routers = "seeds: [1]\nplanned: [0.5]\nrouters: {kl: {}}\n"
    Path("elsewhere.yaml").write_text(
        f"recipe: micro\ngames: 4\nbudgets: [0.5]\nrules: [margin]\nbenchmark: {other}\n{routers}"
    )
    kept = Path("data/scratch/studies/.kept")
    before = set(kept.iterdir())
    done = dmr("study", "run", "elsewhere.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    played = pl.read_parquet("data/scratch/studies/elsewhere/episodes.parquet")
    settings = load_recipe("micro").benchmark.model_copy(update={"seed": 7})
    expected = [f"generated/{seed}" for seed in list(split_seeds(settings, "test"))[:4]]
    assert sorted(played["task_id"].unique()) == expected
    assert played["steps"].max() == 9
    # Three rungs, checking, the oracle, and rule and router at their bars: what tuned them on validation games was kept by the
    # other study.
    assert len(set(kept.iterdir()) - before) == 7
    mine, others = (Path("data/scratch/studies") / study / "artifacts" for study in ("elsewhere", "small"))
    router = artifact_folder("kl_router", "kl-1", mine) / "manifest.json"
    assert router.samefile(artifact_folder("kl_router", "kl-1", others) / "manifest.json")


def assert_another_ladder_is_made_for_a_study() -> None:
    """Of the recipe's agent, also where that comes from Git and its games are not there; the rung that both ladders have is not
    measured again, and the recipe's own ladder stays."""
    shutil.rmtree(artifact_folder("benchmark_tasks", "micro"))
    ladder = "[{name: float, weights: float}, {name: int8, weights: int8}]"
    text = f"recipe: micro\ngames: 4\nbudgets: [0.5]\nrules: [margin]\nprecisions: {{ladder: {ladder}, route: [float, int8]}}\n"
    Path("ladder.yaml").write_text(text)
    before = verify(artifact_folder("quantized_checkpoints", "micro")).hash
    done = dmr("study", "run", "ladder.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rung float: measured before" in done.stdout + done.stderr
    assert "rung int8: measured before" not in done.stdout + done.stderr
    assert verify(artifact_folder("quantized_checkpoints", "micro")).hash == before
    folder = Path("data/scratch/studies/ladder")
    own = artifact_folder("quantized_checkpoints", "ladder", folder / "artifacts")
    assert read_ladder(own).route == ("float", "int8")
    agent = artifact_folder("agent", "ladder", folder / "artifacts") / "manifest.json"
    assert agent.samefile(artifact_folder("agent", "micro") / "manifest.json")
    played = pl.read_parquet(folder / "episodes.parquet")
    assert set(played["policy"]) == {
        "always_float",
        "always_int8",
        "speculative:float<int8",
        "disagreement",
        "rule:margin",
    }


def assert_three_rungs_were_compared(report: dict[str, Any]) -> None:
    policies = report["policies"]
    assert report["route"] == LADDER
    assert set(policies) == POLICIES | {"always_int4", "speculative:float<int4", "speculative:int4<int2"}
    for policy in policies.values():
        assert list(policy["shares"]) == LADDER
        assert sum(policy["shares"].values()) == pytest.approx(1, abs=1e-5)
        assert policy["shares"]["float"] <= policy["spend"] <= 1 - policy["shares"]["int2"]
    for name, rung in (("always_high", "float"), ("always_int4", "int4"), ("always_low", "int2")):
        assert policies[name]["shares"][rung] == 1
    assert 0 == policies["always_low"]["spend"] < policies["always_int4"]["spend"] < policies["always_high"]["spend"]
    assert policies["always_low"]["cost"] < policies["always_int4"]["cost"] < policies["always_high"]["cost"]
    for router in ("kl_router", "grpo_router"):
        mixed, routed = policies[f"random@{router}"]["shares"], policies[router]["shares"]
        assert list(mixed.values()) == pytest.approx(list(routed.values()), abs=0.35)


@pytest.mark.slow
def test_the_whole_pipeline_routes_between_three_rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE_YAML", THREE_RUNGS_YAML)
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE", "micro")
    make_project(tmp_path, pipeline.STAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster_home"))
    done = dmr("run", "micro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_three_rungs_were_compared(json.loads(dmr("report", "micro", "--json").stdout))

    labels = pl.read_parquet(artifact_folder("sensitivity_dataset", "micro") / "steps.parquet")
    played = pl.read_parquet(artifact_folder("trajectories", "micro") / "steps.parquet")
    assert set(played["precision"]) == set(LADDER)
    compared = labels.group_by("episode_id", "turn").agg(pl.col("precision").sort())
    assert len(compared) == len(played)
    assert all(rungs == ["int2", "int4"] for rungs in compared["precision"].to_list())
    for stage in ("kl_router", "grpo_router"):
        settings = json.loads((artifact_folder(stage, "micro") / ROUTER_FOLDER / "router.json").read_text())
        assert list(settings["tokens"]) == LADDER


@pytest.mark.slow
def test_the_committed_ladder_recipe_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
    monkeypatch.chdir(clone)
    monkeypatch.setenv("DAGSTER_HOME", str(clone / "dagster_home"))
    done = dmr("run", "alfworld-tiny-ladder")
    assert done.returncode == 0, done.stdout + done.stderr
    for policy in (*POLICIES, "always_int4"):
        assert policy in done.stdout
    report = json.loads(dmr("report", "alfworld-tiny-ladder", "--json").stdout)
    assert_three_rungs_were_compared(report)
    assert report["gap"]["difference"] > 0
