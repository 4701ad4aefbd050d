import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmr_pipeline.artifacts.folders import sidecar_path
from dmr_pipeline.artifacts.manifest import MANIFEST, folder_hash, hash_files, verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.text_stages import RolloutRequest, stage, write


def leftovers(recipe: Recipe) -> list[str]:
    return [path.name for path in Path("data", recipe.name).iterdir() if path.name.startswith(".") and path.is_dir()]


def test_artifact_holds_its_files_and_where_they_come_from(project: Recipe):
    first = materialize_stage(stage(write("x")), project).artifact
    second = materialize_stage(stage(write("y"), "two", ("one",)), project).artifact
    assert second.manifest.inputs == {"one": first.hash}
    assert second.manifest.sections == {"benchmark": project.benchmark.model_dump(mode="json")}
    assert second.manifest.summary == {"length": 1}
    assert second.hash == folder_hash(hash_files(second.path)) == verify(second.path).hash
    assert second.size == sum(path.stat().st_size for path in second.path.rglob("*") if path.is_file())


def test_an_input_that_another_process_makes_again_meanwhile_makes_no_artifact(project: Recipe):
    """It would be of both, and its manifest would name one."""
    materialize_stage(stage(write("x")), project)

    def run(context: StageContext) -> StageResult:
        materialize_stage(stage(write("z")), project, force=True)
        return write("y")(context)

    with pytest.raises(UserError, match=r"one was made again while two read it"):
        materialize_stage(stage(run, "two", ("one",)), project)
    assert not Path("data", project.name, "two").exists()
    assert not materialize_stage(stage(write("y"), "two", ("one",)), project).skipped


def test_same_provenance_gives_the_same_bytes_and_the_run_is_recorded_beside_them(project: Recipe):
    once = materialize_stage(stage(write("x")), project).artifact
    manifest = (once.path / MANIFEST).read_bytes()
    again = materialize_stage(stage(write("x")), project, force=True)
    assert not again.skipped
    assert (again.artifact.path / MANIFEST).read_bytes() == manifest
    record = json.loads(sidecar_path(once.path).read_text())
    assert record["measured"] == {"pid": os.getpid()}
    assert record["libraries"]["torch"].startswith("2.")
    assert record["git"] is None or set(record["git"]) == {"commit", "clean"}


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        ("nothing", False),
        ("runtime", False),
        ("other section", False),
        ("section", True),
        ("code version", True),
        ("input", True),
        ("force", True),
    ],
)
def test_what_makes_a_stage_stale(project: Recipe, change: str, rebuilt: bool):
    source, two = stage(write("x")), stage(write("y"), "two", ("one",))
    materialize_stage(source, project)
    materialize_stage(two, project)

    recipe = project
    if change == "runtime":
        recipe = project.model_copy(update={"runtime": project.runtime.model_copy(update={"threads": 7})})
    if change == "other section":
        recipe = project.model_copy(update={"evaluation": project.evaluation.model_copy(update={"seed": 7})})
    if change == "section":
        two = replace(two, sections=("evaluation",))
        materialize_stage(two, recipe)
        recipe = project.model_copy(update={"evaluation": project.evaluation.model_copy(update={"seed": 7})})
    if change == "code version":
        two = replace(two, code_version="2")
    if change == "input":
        materialize_stage(stage(write("z")), recipe, force=True)
    assert materialize_stage(two, recipe, force=change == "force").skipped is not rebuilt


@pytest.mark.parametrize(
    ("harm", "named", "problem"),
    [
        (lambda folder: (folder / "folder/text").write_text("z"), "folder/text", "was changed"),
        (lambda folder: (folder / "folder/text").unlink(), "folder/text", "is missing"),
        (lambda folder: (folder / "more").write_text(""), "more", "does not belong there"),
        (lambda folder: (folder / MANIFEST).unlink(), MANIFEST, "is missing or malformed"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), MANIFEST, "is missing or malformed"),
    ],
)
def test_damage_is_found_on_reading(project: Recipe, harm: Callable[[Path], object], named: str, problem: str):
    one, two = stage(write("x")), stage(write("y"), "two", ("one",))
    folder = materialize_stage(one, project).artifact.path
    harm(folder)
    with pytest.raises(
        UserError, match=rf"{named} {problem}: .*`dmr restore one .* `dmr materialize one --recipe fake --force`"
    ):
        materialize_stage(two, project)
    assert not materialize_stage(one, project).skipped  # its own maker mends it
    assert materialize_stage(two, project).artifact.manifest.inputs["one"] == verify(folder).hash


def test_missing_input_names_the_commands_that_make_it_and_all_before_it(project: Recipe):
    problem = "is missing: make it with `dmr materialize one --recipe fake`, or all that is missing with `dmr run fake`"
    with pytest.raises(UserError, match=problem):
        materialize_stage(stage(write("y"), "two", ("one",)), project)


def test_damaged_committed_artifact_is_not_silently_made_again(project: Recipe):
    one = stage(write("x"), committed_recipes=("fake",))
    folder = materialize_stage(one, project).artifact.path
    (folder / "folder/text").write_text("z")
    with pytest.raises(UserError, match="get it back with `dmr restore one --recipe fake`"):
        materialize_stage(one, project)
    assert not materialize_stage(one, project, force=True).skipped


KILLED = """
import os, signal, sys
from pathlib import Path
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.recipe.reading import load_recipe
from tests.helpers.text_stages import stage, write

moment = int(sys.argv[1])
def die(): os.kill(os.getpid(), signal.SIGKILL)
def run(context):
    result = write("new")(context)
    if moment == 0:
        die()
    return result
renames = 0
rename = Path.rename
def counted(self, target):
    global renames
    renames += 1
    if renames == moment:
        die()
    return rename(self, target)
Path.rename = counted
if moment == 3:
    import shutil
    shutil.rmtree = lambda folder, **kwargs: die() if folder.name == ".one.old" and folder.exists() else None
materialize_stage(stage(run, code_version="2"), load_recipe("fake"))
"""


@pytest.mark.parametrize(
    "moment", [0, 1, 2, 3], ids=["in the stage", "before renames", "between renames", "after renames"]
)
def test_a_kill_leaves_the_old_artifact_or_the_new_one(project: Recipe, moment: int):
    old = materialize_stage(stage(write("old")), project).artifact
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(moment)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    survivor = verify(old.path)
    assert (survivor.path / "folder/text").read_text() == ("new" if moment == 3 else "old")

    finished = materialize_stage(stage(write("new"), code_version="2"), project)
    assert finished.skipped is (moment == 3)
    assert (finished.artifact.path / "folder/text").read_text() == "new"
    if moment < 3:
        assert leftovers(project) == []


def test_two_processes_do_the_work_once(project: Recipe):
    runs = []

    def run(context: StageContext) -> StageResult:
        runs.append(context.output)
        return write("x")(context)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: materialize_stage(stage(run), project), range(2)))
    assert len(runs) == 1
    assert sorted(result.skipped for result in done) == [False, True]


def full_disk(context: StageContext) -> StageResult:
    (context.output / "half").write_text("half")
    with open("/dev/full", "w") as device:  # noqa: PTH123
        device.write("x")
    return StageResult({})


def hidden_full_disk(context: StageContext) -> StageResult:
    raise RuntimeError("PytorchStreamWriter failed writing file")


@pytest.mark.parametrize("run", [full_disk, hidden_full_disk])
def test_full_disk_is_one_clear_error_and_the_old_artifact_stays(
    project: Recipe, run: RolloutRequest, monkeypatch: pytest.MonkeyPatch
):
    old = materialize_stage(stage(write("old")), project).artifact
    if run is hidden_full_disk:
        with pytest.raises(RuntimeError):  # while there is space, the failure is what it says
            materialize_stage(stage(run), project, force=True)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="no space left"):
        materialize_stage(stage(run), project, force=True)
    assert verify(old.path) == old
    assert leftovers(project) == []


def test_what_a_stage_logs_is_in_its_record(project: Recipe):
    def run(context: StageContext) -> StageResult:
        logging.getLogger("dmr_pipeline.anything").info("loss %.1f", 0.5)
        return write("x")(context)

    logging.getLogger("dmr_pipeline").setLevel(logging.INFO)
    (line,) = json.loads(sidecar_path(materialize_stage(stage(run), project).artifact.path).read_text())["log"]
    assert line.endswith("INFO loss 0.5")


def test_pickles_are_refused(project: Recipe):
    def run(context: StageContext) -> StageResult:
        (context.output / "weights.pt").write_bytes(b"")
        return StageResult({})

    with pytest.raises(UserError, match=r"no pickles, found weights\.pt"):
        materialize_stage(stage(run), project)
    assert not Path("data/fake/one").exists()


def test_resume_state_is_kept_for_the_same_provenance_only(project: Recipe):
    seen: list[list[str]] = []

    def run(context: StageContext) -> StageResult:
        seen.append([path.name for path in context.scratch.iterdir()])
        (context.scratch / "checkpoint").write_text("half")
        if len(seen) < 4:
            raise RuntimeError("killed")
        return write("x")(context)

    for version in ("1", "1", "2", "2"):
        with contextlib.suppress(RuntimeError):
            materialize_stage(stage(run, code_version=version), project)
    assert seen == [[], ["checkpoint"], [], ["checkpoint"]]
    assert not Path("data/scratch/fake/one").exists()


def keeping(seen: list[list[str]], fails: Sequence[int] = ()) -> RolloutRequest:
    """A stage that keeps a file more each time, and is killed at these calls."""

    def run(context: StageContext) -> StageResult:
        assert context.kept is not None
        context.kept.mkdir(parents=True, exist_ok=True)
        seen.append(sorted(path.name for path in context.kept.iterdir()))
        (context.kept / f"{len(seen)}").write_text("kept")
        if len(seen) in fails:
            raise RuntimeError("killed")
        return write("x")(context)

    return run


def test_what_a_stage_keeps_outlives_success_and_changes_but_no_other_code_version(project: Recipe):
    seen: list[list[str]] = []
    run = keeping(seen)
    materialize_stage(stage(run), project)
    other = project.model_copy(update={"release": project.release.model_copy(update={"bootstrap": 999})})
    materialize_stage(stage(run, sections=("release",)), other)
    materialize_stage(stage(run, code_version="2"), project)
    materialize_stage(stage(run), project)
    assert seen == [[], ["1"], [], []]


def test_a_forced_run_uses_nothing_that_was_kept_before_and_resumes_its_own(project: Recipe):
    seen: list[list[str]] = []
    run = keeping(seen, fails=[2])
    materialize_stage(stage(run), project)
    with pytest.raises(RuntimeError):
        materialize_stage(stage(run), project, force=True)
    materialize_stage(stage(run), project, force=True)
    assert seen == [[], [], ["2"]]
    materialize_stage(stage(run, sections=("release",)), project)
    assert seen[3] == ["2", "3"], "what the forced run has kept takes the place of the rest"
    assert not Path("data/scratch/fake/one").exists()
