"""What the command line says of damage, and that each remedy it prints works when it is run as it is printed."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder, sidecar_path
from dmr_pipeline.artifacts.manifest import MANIFEST, verify
from dmr_pipeline.cli.stages import stage_states
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.versioning import lock_file
from tests.helpers.commands import dmr
from tests.helpers.fake_project import RECIPE, dvc

pytestmark = pytest.mark.usefixtures("fake_report")

CACHE = Path(".dvc/cache/files/md5")


def lock_of_all() -> dict[str, object]:
    return {address: entry["outs"] for address, entry in lock_file.read_entries().items()}


def edit_manifest(folder: Path) -> None:
    """One digit of its summary."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    content["summary"]["inputs"] += 1
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def edit_file(folder: Path) -> None:
    (folder / "content.json").write_text("{ }")


def one_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def remedies(line: str) -> list[str]:
    return re.findall(r"`([^`]+)`", line)


def run_remedy(command: str) -> None:
    """As a shell would; `dmr` in this process, on the fake stages."""
    words = shlex.split(command)
    if words[0] == "dmr":
        result = dmr(*words[1:])
        assert result.exit_code == 0, (command, result.output)
    else:
        subprocess.run(command, shell=True, check=True)


@pytest.mark.parametrize("name", ["benchmark_tasks", "agent", "ingested_trajectories", "released_router"])
def test_an_edited_manifest_stops_the_run_and_changes_nothing(finished_project: Recipe, name: str):
    before, folder = lock_of_all(), artifact_folder(name, RECIPE)
    edit_manifest(folder)
    edited = (folder / MANIFEST).read_bytes()
    states = {stage: state for stage, state, _, _ in stage_states(load_recipe(RECIPE))}
    assert states[name] == "damaged"
    line = one_line(dmr("run", RECIPE))
    assert f"data/fake/{name} is " in line
    assert lock_of_all() == before
    assert (folder / MANIFEST).read_bytes() == edited
    assert len(remedies(line)) == 2


@pytest.mark.parametrize("harm", [edit_manifest, edit_file])
@pytest.mark.parametrize("name", ["benchmark_tasks", "agent", "ingested_trajectories", "released_router"])
@pytest.mark.parametrize("number", [0, 1])
def test_each_remedy_that_is_printed_mends(
    finished_project: Recipe, name: str, harm: Callable[[Path], None], number: int
):
    before, folder = lock_of_all(), artifact_folder(name, RECIPE)
    harm(folder)
    reader = next((stage.name for stage in pipeline.STAGES if name in stage.inputs), name)
    line = one_line(dmr("materialize", reader, "--recipe", RECIPE))
    run_remedy(remedies(line)[number])
    assert "nothing to do" in dmr("run", RECIPE).output
    assert lock_of_all() == before


def test_an_edited_report_is_not_shown(finished_project: Recipe):
    edit_manifest(artifact_folder("evaluation_report", RECIPE))
    assert "evaluation_report is " in one_line(dmr("report", RECIPE))
    assert "evaluation_report is " in one_line(dmr("provenance", "data/fake/evaluation_report"))


@pytest.mark.parametrize("name", ["benchmark_tasks", "ingested_trajectories"])
def test_a_damaged_object_in_the_cache_does_not_come_back(finished_project: Recipe, name: str):
    """There is no remote: what is lost is named, and made again where it can be."""
    folder = artifact_folder(name, RECIPE)
    before, oid = lock_of_all(), verify(folder).manifest.files["content.json"]
    cached = CACHE / oid[:2] / oid[2:]
    cached.chmod(0o644)
    cached.write_text("damaged")
    cached.chmod(0o444)
    shutil.rmtree(folder)
    dvc("checkout", str(folder))
    assert (folder / "content.json").read_text() == "damaged"
    assert oid in one_line(dmr("restore", name, "--recipe", RECIPE))
    line = one_line(dmr("restore", name, "--recipe", RECIPE))
    for remedy in remedies(line):
        if "dvc.lock" not in remedy:
            run_remedy(remedy)
    if name == "benchmark_tasks":
        assert verify(folder).hash
        shutil.rmtree(folder)
        dvc("checkout", str(folder))
    assert "nothing to do" in dmr("run", RECIPE).output
    assert lock_of_all() == before


def test_history_that_is_lost_can_be_given_up(finished_project: Recipe):
    """The message asks for the entry's removal from `dvc.lock`."""
    name = "released_router"
    folder = artifact_folder(name, RECIPE)
    shutil.rmtree(CACHE)
    shutil.rmtree(folder)
    lock = Path("dvc.lock")
    address = f"{name}@{RECIPE}"
    lock.write_text(lock.read_text().replace(lock_file.read_entries()[address]["outs"][0]["md5"], "0" * 32 + ".dir"))
    line = one_line(dmr("materialize", name, "--recipe", RECIPE))
    assert "removing that entry of dvc.lock" in line
    text = lock.read_text()
    lock.write_text(text[: text.index(f"  {address}")])
    result = dmr("materialize", name, "--recipe", RECIPE)
    assert result.exit_code == 0, result.output
    assert verify(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00\xfe", b"[]", b'{"finished": "yesterday"}'])
def test_a_damaged_run_record_stops_nothing_and_is_said(
    finished_project: Recipe, content: bytes, capfd, caplog: pytest.LogCaptureFixture
):
    for name in ("agent", "evaluation_report"):
        sidecar_path(artifact_folder(name, RECIPE)).write_bytes(content)
    status = dmr("status", RECIPE)
    assert status.exit_code == 0
    assert "run record" in status.output
    assert "run.json: the run record is damaged" in caplog.text
    for command in (("run", RECIPE), ("report", RECIPE), ("provenance", "data/fake/evaluation_report")):
        result = dmr(*command)
        assert result.exit_code == 0, result.output
    assert dmr("materialize", "evaluation_report", "--recipe", RECIPE).exit_code == 0


@pytest.mark.parametrize(
    "command",
    [
        ("run", RECIPE),
        ("materialize", "agent", "--recipe", RECIPE),
        ("restore", "benchmark_tasks", "--recipe", RECIPE),
        ("status", RECIPE),
        ("report", RECIPE),
        ("provenance", "data/fake/agent"),
    ],
)
@pytest.mark.parametrize("harm", ["empty", "conflict"])
def test_an_unreadable_dvc_lock_is_one_line_in_every_command(
    finished_project: Recipe, command: tuple[str, ...], harm: str
):
    lock_file.read_entries()
    lock = Path("dvc.lock")
    whole = lock.read_text()
    lock.write_text("" if harm == "empty" else f"<<<<<<< HEAD\n{whole}=======\n{whole}>>>>>>> other\n")
    line = one_line(dmr(*command))
    (remedy,) = remedies(line)
    run_remedy(remedy)
    assert "nothing to do" in dmr("run", RECIPE).output
    assert lock.read_text() == whole


def test_entries_lost_by_a_cut_are_named_and_recorded_again(finished_project: Recipe):
    lock_file.read_entries()
    before, lock = lock_of_all(), Path("dvc.lock")
    text = lock.read_text()
    cut = text.index(f"  kl_router@{RECIPE}")
    lock.write_text(text[:cut])
    status = dmr("status", RECIPE)
    assert (
        "dvc.lock has lost its entries of kl_router, grpo_router, evaluation_report, released_router" in status.stderr
    )
    result = dmr("run", RECIPE)
    assert "has lost its entries" in result.stderr
    assert "done in" not in result.output, "nothing is made again"
    assert lock_of_all() == before
    assert "has lost" not in dmr("run", RECIPE).stderr
