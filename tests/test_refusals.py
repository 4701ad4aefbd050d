"""What the operating system refuses: a line each that says what, where and what to do, and nothing is lost."""

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.defs import runs
from dmr_pipeline.errors import UserError, causes, refusal
from dmr_pipeline.recipe import Recipe
from tests.helpers.fake_project import RECIPE, REPOSITORY

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
PR_CAPBSET_DROP = 24
CODE = f"""
import json, os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from typer.testing import CliRunner
from dmr_pipeline import pipeline
from dmr_pipeline.cli import app
from tests.helpers.fake_project import fake_stages

pipeline.STAGES = fake_stages()
found = {{}}
for place, mode in json.loads(sys.argv[1]):
    before = os.stat(place).st_mode
    os.chmod(place, mode)
    try:
        result = CliRunner().invoke(app, ["materialize", "agent", "--force", "--recipe", {RECIPE!r}])
    finally:
        os.chmod(place, before)
    found[place] = result.exit_code, result.stderr
print(json.dumps(found))
"""
PLACES = {
    "data": 0o000,
    f"data/{RECIPE}": 0o500,
    f"data/{RECIPE}/benchmark_tasks": 0o000,
    "dagster_home": 0o000,
    "dagster_home/history": 0o000,
    "dvc.lock": 0o000,
    "dvc.yaml": 0o000,
    ".dvc": 0o000,
    ".dvc/cache": 0o000,
    ".dvc/tmp": 0o000,
    "recipes": 0o000,
    f"recipes/{RECIPE}.yaml": 0o000,
    "dagster_home/history/runs.db": 0o400,  # last: SQLite keeps it open
}


def give_up_roots_rights() -> None:
    """Root may read and write everything; without two capabilities modes hold for root too."""
    if os.getuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if libc.prctl(PR_CAPBSET_DROP, capability) != 0:
                raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.skipif(os.getuid() == 0 and sys.platform != "linux", reason="modes do not hold for root here")
def test_what_may_not_be_read_or_written_is_one_line_and_nothing_is_lost(project: Recipe):
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks"])
    before = verify(artifact_folder("benchmark_tasks", RECIPE))
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(list(PLACES.items()))],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        preexec_fn=give_up_roots_rights,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = {
        place: said for place, (code, said) in found.items() if (code, said.count("\n"), said[:7]) != (2, 1, "error: ")
    }
    assert not wrong, json.dumps(wrong, indent=1)
    runs.materialize(pipeline.STAGES, RECIPE, ["agent"])
    assert verify(artifact_folder("benchmark_tasks", RECIPE)) == before


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path_factory.mktemp("small")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


FULL = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from dmr_pipeline import pipeline
from dmr_pipeline.__main__ import main
from tests.helpers.fake_project import fake_stages
pipeline.STAGES = fake_stages()
sys.argv = ["dmr", "materialize", "benchmark_tasks", "--recipe", {RECIPE!r}]
main()
"""


@pytest.mark.parametrize("free", [0, 400_000])
def test_a_full_disk_under_dagsters_database_is_one_line(
    project: Recipe, small_disk: Path, monkeypatch: pytest.MonkeyPatch, free: int
):
    """Full from the start, or in the middle of the run."""
    (small_disk / "dagster.yaml").write_bytes(Path("dagster_home/dagster.yaml").read_bytes())
    monkeypatch.setenv("DAGSTER_HOME", str(small_disk))
    filling = small_disk / "filling"
    with filling.open("wb", buffering=0) as file:
        file.write(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - free))
    command = [sys.executable, "-c", FULL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert str(small_disk) in done.stderr
    filling.unlink()
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 0, again.stderr


def test_causes_come_once_and_as_a_traceback_shows_them():
    first, second, hidden = ValueError("first"), KeyError("second"), OSError("hidden")
    second.__cause__ = first
    first.__cause__ = second
    assert list(causes(second)) == [second, first]
    first.__cause__, first.__context__ = None, hidden  # suppressed: `__cause__` was set
    assert list(causes(second)) == [second, first]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EFBIG])
def test_a_refusal_names_the_file_and_the_remedy_through_wrappers(number: int):
    try:
        try:
            raise OSError(number, os.strerror(number), "data/x/steps.parquet")
        except OSError as error:
            raise RuntimeError("could not write") from error
    except RuntimeError as error:
        said = refusal(error)
    assert said is not None
    assert said.startswith(f"data/x/steps.parquet: {os.strerror(number)}: ")
    assert "run the same command again" in said


def test_a_bug_is_no_refusal():
    assert refusal(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None
    assert refusal(UserError("bad input")) is None
