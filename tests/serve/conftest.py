import shutil
from pathlib import Path

import pytest

from tests.helpers.serving import make_served_project


@pytest.fixture(scope="session")
def served_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "project"
    make_served_project(folder)
    return folder


@pytest.fixture
def served_project(served_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a ladder and a released router: the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(served_template, folder)
    monkeypatch.chdir(folder)
    return folder
