"""Every real stage on a recipe of a few games and an agent that has learned nothing: it must run, and repeat itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.recipe import load_recipe
from dmr_pipeline.rollout.cost import episode_cost
from dmr_pipeline.rollout.engine import Run, SinglePrecision
from dmr_pipeline.rollout.playing import Ladder
from tests.helpers.fake_project import make_project
from tests.helpers.micro_recipe import RECIPE_YAML


def dmr(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "dmr"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.fake_project.RECIPE_YAML", RECIPE_YAML)
        patch.setattr("tests.helpers.fake_project.RECIPE", "micro")
        make_project(folder, pipeline.STAGES)
    return folder


def assert_the_rung_acted_alone(cost: float) -> None:
    """As where int4 is the low precision, and low acts throughout."""
    recipe = load_recipe("micro")
    precisions = recipe.precisions.model_copy(update={"low": "int4"})
    ladder = Ladder.load(
        artifact_folder("quantized_checkpoints", "micro"), recipe.model_copy(update={"precisions": precisions})
    )
    games = benchmark_of(recipe.benchmark).read_tasks(artifact_folder("benchmark_tasks", "micro"), "test")
    played = ladder.play([Run(game) for game in games], SinglePrecision(high=False), seed=0)
    spent = [episode_cost(trajectory, ladder.weight_bytes) / ladder.always_high_cost for trajectory in played]
    assert cost == pytest.approx(sum(spent) / len(spent), abs=1e-6)


def test_the_whole_pipeline_runs_and_repeats_itself(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("DAGSTER_HOME", str(project / "dagster_home"))
    first = dmr("run", "micro")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "always_high" in first.stdout
    assert "report.html" in first.stdout

    report = json.loads(dmr("report", "micro", "--json").stdout)
    policies = report["policies"]
    assert set(policies) == {
        "always_high",
        "always_low",
        "always_int4",
        "confidence",
        "kl_router",
        "grpo_router",
        "random@kl_router",
        "random@grpo_router",
        "disagreement",
    }
    assert all(policy["n"] == 4 for policy in policies.values())
    assert (policies["always_high"]["high_ratio"], policies["always_int4"]["high_ratio"]) == (1.0, 0.0)
    assert policies["random@kl_router"]["episodes"] == 12
    assert_the_rung_acted_alone(report["policies"]["always_int4"]["cost"])
    assert Path(report["html"]).read_text().count("data:image/png;base64,") >= 4

    again = dmr("run", "micro")
    assert "nothing to do" in again.stdout

    hashes = {stage.name: verify(artifact_folder(stage.name, "micro")).hash for stage in pipeline.STAGES}
    for name in ("agent", "sensitivity_dataset", "grpo_router", "evaluation_report"):
        done = dmr("materialize", name, "--recipe", "micro", "--force")
        assert done.returncode == 0, done.stdout + done.stderr
        assert verify(artifact_folder(name, "micro")).hash == hashes[name], name
