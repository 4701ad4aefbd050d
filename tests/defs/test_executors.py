import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from dmr_pipeline.defs.executors import enter_home, executor
from dmr_pipeline.errors import UserError

NEEDS_RAY = pytest.mark.skipif(
    importlib.util.find_spec("dagster_ray") is None,
    reason="Ray is not installed: pip install 'dmr-pipeline[ray]'",
)


def executor_name(chosen: dg.ExecutorDefinition | None) -> str:
    """What a job of a code location with this executor is run by."""
    asset = dg.asset(name="a")(lambda: None)
    definitions = dg.Definitions(assets=[asset], executor=chosen)
    return definitions.resolve_implicit_global_asset_job_def().executor_def.name


@pytest.mark.parametrize("value", [None, "local"])
def test_steps_stay_on_this_machine_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, value: str | None):
    monkeypatch.delenv("DMR_EXECUTOR", raising=False)
    if value is not None:
        monkeypatch.setenv("DMR_EXECUTOR", value)
    assert executor_name(executor()) == "multi_or_in_process_executor"


@NEEDS_RAY
def test_ray_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DMR_EXECUTOR", "ray")
    assert executor_name(executor()) == "ray"


def test_another_value_names_the_ones_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DMR_EXECUTOR", "slurm")
    with pytest.raises(UserError, match=r"^DMR_EXECUTOR is 'slurm': set it to 'local', 'ray' or 'kubernetes'$"):
        executor()


@pytest.mark.parametrize("missing", ["ray", "dagster_ray"])
def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == missing else found(name),
    )
    monkeypatch.setenv("DMR_EXECUTOR", "ray")
    with pytest.raises(UserError, match=r"pip install 'dmr-pipeline\[ray\]'"):
        executor()


@pytest.mark.parametrize("chosen", ["local", pytest.param("ray", marks=NEEDS_RAY)])
def test_ray_is_imported_only_where_steps_run_on_it(chosen: str):
    """Not even the code location that hands its steps to Ray needs it before a run starts."""
    code = (
        "import sys; from dmr_pipeline.defs.executors import executor; executor();"
        " print(*sorted({'ray', 'dagster_ray'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "DMR_EXECUTOR": chosen},
    )
    assert done.stdout.split() == {"local": [], "ray": ["dagster_ray"]}[chosen]


def test_dmr_home_becomes_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    (home / "dvc.yaml").touch()
    monkeypatch.chdir(here)
    monkeypatch.delenv("DMR_HOME", raising=False)
    enter_home()
    assert Path.cwd() == here
    monkeypatch.setenv("DMR_HOME", str(home))
    enter_home()
    assert Path.cwd() == home


def test_a_dmr_home_without_a_project_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DMR_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"^DMR_HOME is .*nowhere, which holds no dvc.yaml: set it to"):
        enter_home()
    assert Path.cwd() == tmp_path
