import os
import shutil
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, here and in what tests start: its threads do not survive the fork in which episodes are played, and
# the stages, which a pipeline gives one thread, are called without it here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from rich.table import Table

from dmr_pipeline import pipeline
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from tests.helpers.fake_project import RECIPE, enter_project, fake_stages, make_project

# Tests that run in the background, as under nohup, were started to ignore SIGINT; Dagster then makes SIGTERM ignored too, in
# this process and in all that it starts, and those that should end by it never do.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The width of what commands print is each test's own choice. rich keeps these from the moment that its console is made, and
# processes of pytest-xdist have them of the readline library of the process that starts them.
for variable in ("COLUMNS", "LINES"):
    os.environ.pop(variable, None)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe of a fake project: the working directory, and its stages the pipeline's table, for one test."""
    recipe = make_project(tmp_path, fake_stages())
    enter_project(tmp_path, monkeypatch)
    return recipe


@pytest.fixture(scope="session")
def finished_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dmr_pipeline.defs import runs

    folder = tmp_path_factory.mktemp("finished")
    make_project(folder, fake_stages())
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter_project(folder, monkeypatch)
        runs.materialize(pipeline.STAGES, RECIPE, [stage.name for stage in pipeline.STAGES])
    return folder


@pytest.fixture
def finished_project(finished_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """As `project`, with every stage materialised."""
    shutil.copytree(finished_template, tmp_path, dirs_exist_ok=True)
    enter_project(tmp_path, monkeypatch)
    return load_recipe(RECIPE)


@pytest.fixture
def torch_threads() -> Iterator[int]:
    """How many torch has; those of the other tests are as they were again."""
    import torch

    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def fake_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of an evaluation, of no more than its name: the fake stages make no whole one."""

    def render_beside(data_root: Path, recipe: str) -> Path:
        folder = data_root / recipe / "evaluation_report"
        html = folder.with_name("report.html")
        html.write_text(folder.name)
        return html

    report = types.ModuleType("dmr_pipeline.evaluation.report")
    report.render_beside = render_beside
    report.console_table = lambda metrics: Table(f"policies of {metrics['recipe']}")
    monkeypatch.setitem(sys.modules, report.__name__, report)


WHOLE = (
    *("subprocess", "typer", "dagster", "dvc"),
    *("dmr_pipeline.artifacts.provenance", "dmr_pipeline.defs", "dmr_pipeline.stages", "dmr_pipeline.versioning"),
    *("dmr_pipeline.gpu_check", "dmr_pipeline.rollout_bench"),
)
"""What starts programs or commands, works with a project or whole stages, or measures."""


def is_whole(module: types.ModuleType) -> bool:
    """Whether it has imported something of these, or a function of a helper that has."""
    origins = {
        value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
        for value in vars(module).values()
        if isinstance(value, types.ModuleType | types.FunctionType | type)
    }
    helpers = {name for name in origins if name.startswith("tests.helpers.") and name != module.__name__}
    return any(f"{name}.".startswith(f"{part}.") for name in origins for part in WHOLE) or any(
        is_whole(sys.modules[name]) for name in helpers
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The mark `fast` is for tests that neither their module nor that of a fixture makes a matter of whole projects."""
    known: dict[str, bool] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = [fixture for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
            modules = {item.function.__module__, *(fixture.func.__module__ for fixture in fixtures)}
            for name in modules - known.keys():
                known[name] = is_whole(sys.modules[name])
            if not any(known[name] for name in modules):
                item.add_marker("fast")
