import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import dagster as dg
import psutil
import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.defs import runs
from dmr_pipeline.recipe import Recipe
from tests.helpers.fake_project import RECIPE, REPOSITORY

CODE = (
    f"import logging, sys; sys.path.insert(0, {str(REPOSITORY)!r}); logging.basicConfig(level=logging.INFO)\n"
    "from tests.helpers.fake_project import fake_stages; from dmr_pipeline.defs import runs\n"
    "from dmr_pipeline import interrupts\n"
    f"interrupts.in_thread(lambda: runs.materialize(fake_stages(), {RECIPE!r}, ['agent']))\n"
)


@pytest.fixture
def waiting(project: Recipe) -> Iterator[subprocess.Popen[str]]:
    """A process that waits for the pool's only slot, which a living run holds."""
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks"])
    with dg.DagsterInstance.get() as instance:
        storage = instance.event_log_storage
        storage.set_concurrency_slots("gpu", 1)
        assert storage.claim_concurrency_slot("gpu", "another-run", "agent").is_claimed
        process = subprocess.Popen([sys.executable, "-c", CODE], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if "waiting for it to end" in line:
                break
        yield process
        process.kill()
        process.wait()


@pytest.mark.timing
def test_a_run_waits_for_a_slot_without_using_the_processor(waiting: subprocess.Popen[str]):
    process = psutil.Process(waiting.pid)
    before, started = sum(process.cpu_times()[:2]), time.perf_counter()
    time.sleep(6)
    assert sum(process.cpu_times()[:2]) - before < 0.5 * (time.perf_counter() - started)


def test_a_run_waits_for_a_slot_and_starts_once_it_is_free(waiting: subprocess.Popen[str]):
    assert not artifact_folder("agent", RECIPE).exists()
    with dg.DagsterInstance.get() as instance:
        instance.event_log_storage.free_concurrency_slots_for_run("another-run")
    assert waiting.wait(timeout=120) == 0
    assert artifact_folder("agent", RECIPE).exists()


def test_a_waiting_run_dies_of_sigterm(waiting: subprocess.Popen[str]):
    os.kill(waiting.pid, signal.SIGTERM)
    assert waiting.wait(timeout=60) == 128 + signal.SIGTERM
    assert not artifact_folder("agent", RECIPE).exists()


def test_a_run_that_waits_notices_that_the_one_with_the_slot_was_killed(project: Recipe):
    """Who is killed while another waits takes its slot along, unless the waiting one frees it."""
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks"])
    with dg.DagsterInstance.get() as instance:
        (earlier,) = instance.get_runs()
        killed = instance.add_run(earlier._replace(run_id="killed", status=dg.DagsterRunStatus.STARTED))
        storage = instance.event_log_storage
        storage.set_concurrency_slots("gpu", 1)
        assert storage.claim_concurrency_slot("gpu", killed.run_id, "agent").is_claimed
        living = f"{platform.node()} {os.getpid()} {psutil.Process().create_time():.0f}"
        instance.add_run_tags(killed.run_id, {runs.PROCESS_TAG: living})
        process = subprocess.Popen([sys.executable, "-c", CODE], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if "waiting for it to end" in line:
                break
        instance.add_run_tags(killed.run_id, {runs.PROCESS_TAG: f"{platform.node()} {os.getpid()} 0"})
        try:
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()
    assert artifact_folder("agent", RECIPE).exists()


def test_commands_that_are_first_in_a_new_home_do_not_meet_in_its_tables(project: Recipe):
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from dmr_pipeline.defs import runs\n"
        "sys.stdin.read()\n"
        "with runs._open_instance() as instance:\n    print(instance.get_runs_count())\n"
    )
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(4)]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    for process in started:
        printed, complaint = process.communicate(timeout=120)
        assert (process.returncode, printed) == (0, "0\n"), complaint
