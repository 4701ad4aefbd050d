"""Every real stage where all precisions have one cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from tests.helpers.fake_project import make_project
from tests.helpers.micro_recipe import RECIPE_YAML

SHARED_YAML = RECIPE_YAML.replace("precisions:\n", "precisions:\n  cache: shared\n")


def dmr(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "dmr"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_whole_pipeline_runs_with_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE_YAML", SHARED_YAML)
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE", "micro")
    make_project(tmp_path, pipeline.STAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster_home"))
    dmr("run", "micro")
    policies = json.loads(dmr("report", "micro", "--json"))["policies"]
    written, checked = policies["always_high"], policies["speculative:float<int2"]
    assert (checked["success"], checked["steps"]) == (written["success"], written["steps"])
    assert checked["acting_passes"] < written["acting_passes"]
    assert policies["grpo_router"]["cost"] > 0

    steps = pl.read_parquet(artifact_folder("trajectories", "micro") / "steps.parquet")
    read = steps.filter(pl.col("episode_id").str.starts_with("mixed/"))
    new = pl.col("segment").list.len() + pl.col("action").list.len() - (pl.col("turn") == 0)
    assert read.select((pl.col("tokens_read") == new).all()).item()
    labels = pl.read_parquet(artifact_folder("sensitivity_dataset", "micro") / "steps.parquet")
    assert len(labels) == len(steps)

    figures = tmp_path / "figures.json"
    table = dmr("bench", "cache", "micro", "--games", "3", "--at-once", "2", "--json", str(figures))
    assert "speculative:float<int2" in table
    by_policy = {change["policy"]: change for change in json.loads(figures.read_text())["compared"]}
    assert by_policy["always_float"]["success"] == 0
    assert by_policy["random at 0.35"]["cache_bytes"] < 0.6
