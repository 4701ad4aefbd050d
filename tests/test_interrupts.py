"""Signals and errors as a user meets them: `dmr` in a process of its own, on the fake project."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dmr_pipeline import interrupts
from dmr_pipeline.recipe import Recipe
from tests.helpers.fake_project import RECIPE, REPOSITORY, write_fake_dmr

PRELUDE = f"""
import os, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from dmr_pipeline import pipeline
from dmr_pipeline.rollout import parallel
from dmr_pipeline.__main__ import main
from tests.helpers.fake_project import fake_run, fake_stages

def say(word):
    print(word, flush=True)

"""
STAGES = """
pipeline.STAGES = tuple(replace(stage, run=run) if stage.name == "benchmark_tasks" else stage for stage in fake_stages())
"""
COMMAND = f"""{STAGES}
sys.argv = ["dmr", "materialize", "benchmark_tasks", "--recipe", {RECIPE!r}]
main()
"""
"""What a stage does while the signal comes."""
WORK = {
    "sleeps": """
def run(context):
    say("working")
    time.sleep(600)
""",
    "swallows whatever is raised in it": """
def run(context):
    say("working")
    for _ in range(6000):
        try:
            time.sleep(0.1)
        except BaseException:
            pass
""",
    "forks all the time": """
def run(context):
    say("working")
    for _ in range(6000):
        parallel.in_processes(lambda part, advance: part, [[1], [2]])
""",
    "waits for players": """
def play(part, advance):
    say(f"player {os.getpid()}")
    for _ in range(6000):
        time.sleep(0.1)
        advance(1)

def run(context):
    say("working")
    parallel.in_processes(play, [[1], [2]])
""",
}


def start(work: str, **options: object) -> subprocess.Popen[str]:
    code = PRELUDE + work + COMMAND
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


@pytest.fixture
def started(project: Recipe) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    processes = []

    def begin(work: str) -> subprocess.Popen[str]:
        process = start(work)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.communicate()


def until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(
    ("work", "number"),
    [
        ("sleeps", signal.SIGTERM),
        ("swallows whatever is raised in it", signal.SIGINT),
        ("forks all the time", signal.SIGINT),
        ("waits for players", signal.SIGINT),
        ("waits for players", signal.SIGTERM),
    ],
)
def test_an_interrupt_ends_a_run_in_one_line_and_leaves_no_child(
    started: Callable[[str], subprocess.Popen[str]], work: str, number: signal.Signals
):
    process = started(WORK[work])
    until(process, "player" if "players" in work else "working")
    time.sleep(0.3)
    children = psutil.Process(process.pid).children(recursive=True)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    printed, complaint = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert complaint == interrupts.LINE
    assert "Traceback" not in printed
    assert "again;" not in printed, "the stage was started again"
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not Path(f"data/{RECIPE}/benchmark_tasks").exists()


def test_an_interrupted_run_is_canceled_and_the_same_command_resumes(started: Callable[[str], subprocess.Popen[str]]):
    import dagster as dg

    process = started(WORK["sleeps"])
    until(process, "working")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    with dg.DagsterInstance.get() as instance:
        assert [run.status for run in instance.get_runs()] == [dg.DagsterRunStatus.CANCELED]
    again = started("run = fake_run\n")
    _, complaint = again.communicate(timeout=300)
    assert again.returncode == 0, complaint
    assert Path(f"data/{RECIPE}/benchmark_tasks/manifest.json").is_file()


def test_what_is_held_back_ends_before_the_process_does(tmp_path: Path):
    code = """
import os, signal, sys, time
from dmr_pipeline import interrupts

def work():
    with interrupts.held_back():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        print("whole", flush=True)
    time.sleep(600)
    print("too late", flush=True)

interrupts.in_thread(work)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "whole\n", interrupts.LINE)


def test_in_the_main_thread_what_is_held_back_ends_before_the_handler_of_before_is_called():
    seen = []

    def handler(number: int, frame: object) -> None:
        seen.append("handled")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with interrupts.held_back():
            signal.raise_signal(signal.SIGTERM)
            seen.append("whole")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["whole", "handled"]


def test_results_and_errors_come_out_of_the_thread():
    assert interrupts.in_thread(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interrupts.in_thread(lambda: 1 // 0)


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    code = """
import os, signal
from dmr_pipeline import interrupts
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.end_at_once()
interrupts.in_thread(lambda: os.kill(os.getpid(), signal.SIGINT))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_an_interrupt_while_the_program_starts_is_one_line():
    code = """
import os, signal
from dmr_pipeline import interrupts
interrupts.end_at_once()
os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, interrupts.LINE)


def test_a_second_interrupt_does_not_wait_for_the_first():
    code = """
import os, signal
from dmr_pipeline import interrupts
interrupts.end_at_once()
with interrupts.farewell(lambda: os.kill(os.getpid(), signal.SIGTERM)):
    os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, interrupts.LINE)


def test_a_signal_after_the_work_changes_nothing():
    code = """
import atexit, os, signal, sys
from dmr_pipeline.__main__ import main
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
sys.argv = ["dmr", "--help"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_while_the_interpreter_winds_up_changes_nothing():
    """By then Python has put the usual handlers back, of which the process would die without a word."""
    code = """
import os, signal, sys
from dmr_pipeline.__main__ import main
class Late:
    def __del__(self, kill=os.kill, number=signal.SIGTERM, process=os.getpid()):
        kill(process, number)
late = Late()
sys.argv = ["dmr", "--help"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


RAISES = """
def run(context):
    raise RuntimeError("a [bold]bug\\x1b[31m in\\na stage")
"""


def test_an_unforeseen_error_ends_the_command_with_one_line_and_its_traceback_in_a_file(
    started: Callable[[str], subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = started(RAISES)
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 1
    assert complaint.startswith("error: RuntimeError: a [bold]bug\\x1b[31m in a stage (dmr_pipeline/")
    assert complaint.count("\n") == 1
    (file,) = tmp_path.glob("dmr-*.log")
    assert str(file) in complaint
    assert file.read_text().count("RuntimeError: a [bold]bug") == 1


def test_a_child_that_may_not_be_killed_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(child: psutil.Process) -> None:
        raise psutil.AccessDenied(child.pid)

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with monkeypatch.context() as patched:
            patched.setattr(psutil.Process, "kill", refuse)
            interrupts._kill_children()
        interrupts._kill_children()
        assert child.wait(timeout=30) == -signal.SIGKILL
    finally:
        child.kill()


def test_an_unforeseen_error_within_dvc_repro_ends_it_with_one_line(
    project: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    logs = tmp_path / "logs"
    logs.mkdir()
    scripts = write_fake_dmr(tmp_path)
    (scripts / "dmr").write_text(f"#!{sys.executable}{PRELUDE}{RAISES}{STAGES}main()\n")
    monkeypatch.setenv("TMPDIR", str(logs))
    monkeypatch.setenv("PATH", os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]]))
    repro = ["dvc", "repro", f"benchmark_tasks@{RECIPE}"]
    done = subprocess.run(repro, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    ours, dvcs = done.stderr.splitlines()
    assert ours.startswith("error: RuntimeError: a [bold]bug\\x1b[31m in a stage (dmr_pipeline/")
    assert dvcs.startswith("ERROR: failed to reproduce")
    assert [file.read_text().count("RuntimeError: a [bold]bug") for file in logs.glob("dmr-*.log")] == [1]
