"""An artifact is Git's for the recipes that the table names, and in DVC's cache for all others."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import MANIFEST, hash_files, verify
from dmr_pipeline.defs import runs
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_objects
from tests.helpers.fake_project import RECIPE, commit_agent, dvc

AGENT = artifact_folder("agent", RECIPE)
CACHE = Path(".dvc/cache/files/md5")


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout


def make_agent() -> set[str]:
    """What `git status` shows of the data afterwards."""
    git("add", ".")
    git("commit", "-qm", "start")
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks", "agent"])
    return set(git("status", "--porcelain", "--untracked-files=all", "data").split()) - {"??"}


def is_cached(oid: str) -> bool:
    return (CACHE / oid[:2] / oid[2:]).is_file()


def test_a_brought_agent_lies_in_dvcs_cache_and_travels_with_it(
    project: Recipe, tmp_path_factory: pytest.TempPathFactory
):
    assert project.agent.pretrained is not None
    assert make_agent() == set()
    made = verify(AGENT)
    assert all(map(is_cached, [made.hash, *hash_files(AGENT).values()]))
    assert "up to date" in dvc("status", f"cached_agent@{RECIPE}")
    dvc("remote", "add", "--default", "store", str(tmp_path_factory.mktemp("store")))
    dvc("push")
    shutil.rmtree(AGENT)
    shutil.rmtree(CACHE)
    dvc("pull", f"cached_agent@{RECIPE}")
    assert verify(AGENT) == made
    assert git("status", "--porcelain", "data") == ""


def test_a_damaged_agent_that_is_not_gits_comes_out_of_the_cache(project: Recipe):
    make_agent()
    made = verify(AGENT)
    (AGENT / MANIFEST).write_text("{}")
    dvc_objects.restore_recorded(pipeline.find_stage("agent", pipeline.STAGES), RECIPE)
    assert verify(AGENT) == made


def test_a_committed_agent_is_gits_alone(project: Recipe, monkeypatch: pytest.MonkeyPatch):
    commit_agent(monkeypatch)
    assert make_agent() == {str(path) for path in AGENT.iterdir()}
    made = verify(AGENT)
    assert not any(map(is_cached, [made.hash, hash_files(AGENT)[MANIFEST]]))
    assert "up to date" in dvc("status", f"agent@{RECIPE}")
