"""Dagster's own programs in a fake project."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.fake_project import REPOSITORY, fake_stages, make_project

SCRIPTS = Path(sys.executable).parent
WORKSPACE = "load_from:\n  - python_module: {module_name: tests.helpers.location}\n"
PATIENCE = 900.0
"""Seconds that anything may take: a run starts a process for every step, and other work may share the machine."""


def enter_dagster_project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake project with a workspace as the working directory of this process and of Dagster's."""
    make_project(folder, fake_stages())
    monkeypatch.chdir(folder)
    Path("workspace.yaml").write_text(WORKSPACE)
    environment = {
        "DAGSTER_HOME": str(folder / "dagster_home"),
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("DVC_STAGE", "DMR_EXECUTOR", "DMR_HOME"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def running(*command: str) -> Iterator[None]:
    """A program in a session of its own. Whatever it has started is killed at the end; what it said is in `<program>.log`."""
    with Path(f"{command[0]}.log").open("ab") as log:
        process = subprocess.Popen(
            [SCRIPTS / command[0], *command[1:]], start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {what}"
        time.sleep(0.5)
