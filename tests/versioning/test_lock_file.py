import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_objects, dvc_stages, lock_file
from tests.helpers.fake_project import RECIPE, REPOSITORY, dvc

LOCK, COPY = lock_file.LOCK_FILE, lock_file.COPY
TASKS = pipeline.STAGES[0]


def committed(recipe: Recipe, *names: str) -> None:
    for name in names:
        stage = pipeline.find_stage(name, pipeline.STAGES)
        dvc_stages.commit(stage, RECIPE, artifact=materialize_stage(stage, recipe).artifact, rebuilt=True)


def test_what_is_recorded_is_what_dvc_commit_writes(finished_project: Recipe):
    ours = LOCK.read_text()
    dvc("commit", "-f")
    assert LOCK.read_text() == ours
    LOCK.unlink()
    dvc("commit", "-f", f"benchmark_tasks@{RECIPE}")
    theirs = LOCK.read_text()
    LOCK.unlink()
    dvc_stages.commit(TASKS, RECIPE, artifact=verify(artifact_folder(TASKS.name, RECIPE)), rebuilt=True)
    assert LOCK.read_text() == theirs


KILLED = """
import os, signal, sys
from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import fake_stages
event, count = sys.argv[1], int(sys.argv[2])
seen = 0

def audit(name, arguments):
    global seen
    if name == event and arguments and "dvc.lock" in str(arguments[0]):
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(audit)
pipeline.STAGES = fake_stages()
stage = pipeline.STAGES[1]
dvc_stages.commit(stage, "fake", artifact=verify(artifact_folder(stage.name, "fake")), rebuilt=True)
"""


@pytest.mark.parametrize(
    ("event", "count"), [("open", 3), ("open", 4), ("open", 5), ("os.rename", 1), ("os.rename", 2)]
)
def test_a_kill_around_the_write_leaves_the_old_file_or_the_new_one(project: Recipe, event: str, count: int):
    committed(project, "benchmark_tasks")
    before = LOCK.read_bytes()
    artifact = materialize_stage(pipeline.STAGES[1], project).artifact
    done = subprocess.run(
        [sys.executable, "-c", KILLED, event, str(count)],
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    entries = lock_file.read_entries()
    assert LOCK.read_bytes() == before or len(entries) == 2
    assert f"benchmark_tasks@{RECIPE}" in entries
    assert dvc_stages.commit(pipeline.STAGES[1], RECIPE, artifact=artifact, rebuilt=True)
    assert dvc_stages.is_committed(pipeline.STAGES[1], RECIPE, artifact)


def unreadable() -> dict[str, bytes]:
    whole = LOCK.read_bytes()
    half = whole[: whole.index(b"outs:")]
    return {
        "empty": b"",
        "blank": b"\n\n",
        "cut in a key": half + b"ou",
        "cut in the header": whole[:5],
        "not text": b"\xff\xfe" + whole,
        "conflict markers": b"<<<<<<< HEAD\n" + whole + b"=======\n" + whole + b">>>>>>> other\n",
        "bad YAML": whole + b"\t: [",
        "another version": whole.replace(b"'2.0'", b"'9.0'"),
        "a list": b"- 1\n",
        "deep": b"[" * 3000,
        "another hash": whole.replace(b"hash: md5", b"hash: md4"),
    }


@pytest.mark.parametrize(
    "harm",
    sorted(
        [
            "empty",
            "blank",
            "cut in a key",
            "cut in the header",
            "not text",
            "bad YAML",
            "conflict markers",
            "another version",
            "a list",
            "deep",
            "another hash",
        ]
    ),
)
@pytest.mark.parametrize("source", ["copy", "git", "nowhere"])
def test_unreadable_file_is_one_line_and_its_remedy_works(project: Recipe, harm: str, source: str):
    committed(project, "benchmark_tasks")
    whole, damaged = LOCK.read_bytes(), unreadable()[harm]
    if source != "copy":
        COPY.unlink()
    if source == "git":
        subprocess.run(["git", "add", "dvc.lock"], check=True)
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, "commit", "-q", "-m", "lock"], check=True)
    LOCK.write_bytes(damaged)
    with pytest.raises(UserError, match=r"dvc\.lock .*: mend it with `.*`, then run again") as raised:
        lock_file.read_entries()
    assert "\n" not in str(raised.value)
    artifact = verify(artifact_folder(TASKS.name, RECIPE))
    with pytest.raises(UserError, match="mend it"):
        dvc_stages.commit(TASKS, RECIPE, artifact=artifact, rebuilt=True)
    assert LOCK.read_bytes() == damaged
    subprocess.run(str(raised.value).split("`")[1], shell=True, check=True)
    dvc_stages.commit(TASKS, RECIPE, artifact=artifact, rebuilt=False)
    assert lock_file.read_entries().keys() == {f"benchmark_tasks@{RECIPE}"}
    assert LOCK.read_bytes() == whole


def test_entries_that_a_cut_lost_are_known_from_the_copy(project: Recipe):
    committed(project, "benchmark_tasks", "agent")
    whole = LOCK.read_text()
    assert lock_file.lost_entries(lock_file.read_entries()) == {}
    LOCK.write_text(whole[: whole.index(f"  cached_agent@{RECIPE}")])
    for _ in range(2):
        entries = lock_file.read_entries()
        assert entries.keys() == {f"benchmark_tasks@{RECIPE}"}
        assert lock_file.lost_entries(entries).keys() == {f"cached_agent@{RECIPE}"}
    shutil.copy(COPY, LOCK)
    assert LOCK.read_text() == whole


def test_what_git_has_is_not_lost(project: Recipe):
    """Another commit was checked out."""
    committed(project, "benchmark_tasks")
    older = LOCK.read_text()
    committed(project, "agent")
    LOCK.write_text(older)
    assert lock_file.lost_entries(lock_file.read_entries())
    subprocess.run(["git", "add", "dvc.lock"], check=True)
    subprocess.run(["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-qm", "x"], check=True)
    assert not lock_file.lost_entries(lock_file.read_entries())
    assert COPY.read_text() == older


def test_history_whose_entry_was_lost_is_not_started_anew(finished_project: Recipe):
    stage = pipeline.find_stage("released_router", pipeline.STAGES)
    folder = artifact_folder(stage.name, RECIPE)
    wanted, whole = verify(folder).hash, LOCK.read_text()
    lock_file.read_entries()
    LOCK.write_text(whole[: whole.index(f"  released_router@{RECIPE}")])
    shutil.rmtree(folder)
    dvc_objects.ensure_history(stage, RECIPE)
    assert verify(folder).hash == wanted


def test_dvc_keeps_its_notes_in_the_project_and_to_its_owner(project: Recipe, tmp_path: Path, monkeypatch):
    elsewhere = tmp_path / "system"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    started = time.time()
    committed(project, "benchmark_tasks")
    dvc("status")
    site = Path("data/scratch/.dvc")
    assert site.stat().st_mode & 0o777 == 0o700
    assert any(path.is_file() for path in site.rglob("*"))
    assert [path for path in elsewhere.rglob("*") if "dvc" in path.name] == []
    default = Path("/var/tmp/dvc/repo")
    assert not default.is_dir() or not [p for p in default.iterdir() if p.stat().st_mtime >= started - 1]


def test_a_download_without_git_works(project: Recipe):
    shutil.rmtree(".git")
    committed(project, "benchmark_tasks")
    assert dvc_objects.recorded_hash(TASKS, RECIPE) == verify(artifact_folder(TASKS.name, RECIPE)).hash
    dvc_objects.check(TASKS, RECIPE, verify(artifact_folder(TASKS.name, RECIPE)))


def test_an_empty_rwlock_stops_no_commit(project: Recipe):
    committed(project, "benchmark_tasks")
    Path(".dvc/tmp/rwlock").write_text("")
    committed(project, "agent")
    assert len(lock_file.read_entries()) == 2


def test_a_commit_beside_a_dvc_repro_of_the_same_stage(project: Recipe):
    """Such a `repro` notes the stage's files in the rwlock while its command runs, which may itself wait for this process."""
    holder = {"pid": os.getpid(), "cmd": "dvc repro"}
    Path(".dvc/tmp").mkdir(exist_ok=True)
    notes = {"write": {str(Path("data", RECIPE, "benchmark_tasks").resolve()): holder}, "read": {}}
    Path(".dvc/tmp/rwlock").write_text(json.dumps(notes))
    committed(project, "benchmark_tasks")
    assert dvc_stages.is_committed(TASKS, RECIPE, verify(artifact_folder(TASKS.name, RECIPE)))
    assert json.loads(Path(".dvc/tmp/rwlock").read_text()) == notes
