"""`dmr` beside `dvc repro` on the same stage: whoever comes second waits."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.defs import runs
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import RECIPE, REPOSITORY, dvc, write_fake_dmr

AGENT = next(stage for stage in pipeline.STAGES if stage.name == "agent")
SLOW = f"""#!{sys.executable}
import sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from dmr_pipeline import pipeline
from dmr_pipeline.cli import app
from tests.helpers.fake_project import fake_run, fake_stages

def run(context):
    Path("working").touch()
    while not Path("go").exists():
        time.sleep(0.1)
    return fake_run(context)

pipeline.STAGES = tuple(replace(stage, run=run) if stage.name == "agent" else stage for stage in fake_stages())
app()
"""


@pytest.fixture
def scripts(project: Recipe, tmp_path: Path) -> Iterator[Path]:
    """A folder with a `dmr` whose agent is made once the file `go` appears; `benchmark_tasks` is made already."""
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks"])
    folder = write_fake_dmr(tmp_path)
    (folder / "dmr").write_text(SLOW)
    yield folder
    Path("go").touch()


def start(scripts: Path, *command: str) -> subprocess.Popen[str]:
    environment = Path(sys.executable).parent
    path = os.pathsep.join([str(scripts), str(environment), os.environ["PATH"]])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, "PATH": path}, **pipes)


RWLOCK = Path(".dvc/tmp/rwlock")
"""DVC's notes on which of its commands reads or writes which files."""
MATERIALIZE = ("dmr", "materialize", "agent", "--recipe", RECIPE)
# The option is for the moments in which `dmr` commits: DVC itself waits 3 s for its lock.
REPRO = ("dvc", "--wait-for-lock", "repro", f"cached_agent@{RECIPE}")


@pytest.mark.parametrize("commands", [(MATERIALIZE, REPRO), (REPRO, MATERIALIZE)], ids=["dmr first", "dvc first"])
def test_whoever_comes_second_waits(scripts: Path, commands: tuple[tuple[str, ...], tuple[str, ...]]):
    """The pool's only slot, the lock of the stage and DVC's own locks are all asked for by both."""
    first = start(scripts, *commands[0])
    deadline = time.monotonic() + 120
    while not Path("working").exists():
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.1)
    second = start(scripts, *commands[1])
    deadline = time.monotonic() + 120
    while not RWLOCK.is_file() or b"/agent" not in RWLOCK.read_bytes():  # `dvc repro` has come to its stage
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)
    assert second.poll() is None
    Path("go").touch()
    for process in (first, second):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert dvc_stages.is_committed(AGENT, RECIPE, verify(artifact_folder("agent", RECIPE)))
    assert "up to date" in dvc("status", f"cached_agent@{RECIPE}")


def test_a_commit_is_not_refused_because_a_dvc_command_runs_the_same_stage(project: Recipe):
    """Such a command waits for the pool's slot, which whoever commits holds: to wait for it would be for ever."""
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks"])
    stage = pipeline.STAGES[0]
    folder = artifact_folder(stage.name, RECIPE)
    dvc_stages.LOCK_FILE.unlink()
    note = {"write": {str(folder.resolve()): {"pid": os.getppid(), "cmd": "dvc repro"}}, "read": {}}
    RWLOCK.write_text(json.dumps(note))
    assert dvc_stages.commit(stage, RECIPE, artifact=verify(folder), rebuilt=True)
    assert dvc_stages.is_committed(stage, RECIPE, verify(folder))
