"""`dvc repro` on a clean clone with an empty cache: the committed agent is skipped, all else is made again, the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from tests.helpers.fake_project import make_project
from tests.helpers.micro_recipe import RECIPE_YAML

NAME = "alfworld-tiny"  # a recipe whose agent the table says to be in Git
NAMES = {stage.name for stage in pipeline.STAGES}


def run(*command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_clean_clone_skips_the_committed_agent_and_makes_the_rest_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE_YAML", RECIPE_YAML)
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE", NAME)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    original, clone = tmp_path / "original", tmp_path / "clone"
    original.mkdir()
    make_project(original, pipeline.STAGES)
    monkeypatch.chdir(original)
    monkeypatch.setenv("DAGSTER_HOME", str(original / "dagster_home"))
    run("dmr", "run", NAME)
    hashes = {name: verify(artifact_folder(name, NAME)).hash for name in NAMES}
    Path(".gitignore").write_text("/dagster_home/*\n!/dagster_home/dagster.yaml\n")
    run("git", "add", "-A")
    run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "made")

    run("git", "clone", "-q", str(original), str(clone))
    monkeypatch.chdir(clone)
    monkeypatch.setenv("DAGSTER_HOME", str(clone / "dagster_home"))
    assert not Path(".dvc/cache").exists()
    assert {path.name for path in Path("data/alfworld-tiny").iterdir()} == {"agent"}
    said = run("dvc", "repro")
    assert set(re.findall(r"Running stage '(\w+)@alfworld-tiny'", said)) == NAMES - {"agent"}
    assert {name: verify(artifact_folder(name, NAME)).hash for name in NAMES} == hashes
    assert run("git", "status", "--porcelain") == "", "dvc.lock and the agent are what was committed"
    assert "Running stage" not in run("dvc", "repro")
