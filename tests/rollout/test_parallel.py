import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.errors import RaisedElsewhere, UserError
from dmr_pipeline.recipe.runtime import Runtime
from dmr_pipeline.rollout.parallel import gather, in_processes, processes_on, scatter


@given(st.lists(st.integers()), st.integers(1, 6))
def test_dealt_parts_are_even_and_come_back_in_order(items, processes):
    parts = scatter(items, processes)
    assert len(parts) == max(1, min(processes, len(items)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert gather(parts) == items


def test_parts_are_worked_on_at_once_each_in_a_process_of_its_own():
    started = time.time()

    def work(part, on_progress):
        time.sleep(1)
        on_progress(len(part))
        return os.getpid(), time.time(), sum(part)

    told = []
    results = in_processes(work, scatter(range(10), 3), told.append)
    pids, ends, sums = zip(*results, strict=True)
    assert len({*pids, os.getpid()}) == 4
    assert max(ends) - started < 2.5  # one after the other would take 3 s
    assert sums == (0 + 3 + 6 + 9, 1 + 4 + 7, 2 + 5 + 8)
    assert sorted(told) == [3, 3, 4]


def test_what_processes_tell_is_heard_while_they_work_and_in_their_order(tmp_path: Path):
    heard = []

    def work(part, tell):
        tell((part[0], {"first": "message"}))
        deadline = time.time() + 30
        while not (tmp_path / "heard").exists():  # made by the parent once it has heard
            assert time.time() < deadline
            time.sleep(0.01)
        tell((part[0], 2))
        return part[0]

    def told(message):
        heard.append(message)
        (tmp_path / "heard").touch()

    assert in_processes(work, [[0], [1]], told) == [0, 1]
    for part in (0, 1):
        assert [what for sender, what in heard if sender == part] == [{"first": "message"}, 2]


def test_an_error_at_hearing_ends_the_processes(tmp_path: Path):
    def work(part, tell):
        tell(part)
        time.sleep(60)
        (tmp_path / "went on").touch()

    def told(message):
        raise UserError("no space left")

    others = psutil.Process().children()
    with pytest.raises(UserError, match="no space left"):
        in_processes(work, [[0], [1]], told)
    assert not any(tmp_path.iterdir())
    assert psutil.Process().children() == others


def test_a_single_part_stays_in_this_process():
    assert in_processes(lambda part, _: os.getpid(), [[1, 2]]) == [os.getpid()]


def test_an_error_comes_back_as_it_was_and_ends_the_others(tmp_path: Path):
    def work(part, on_progress):
        if part[0] == 1:
            raise UserError("stream too long")
        time.sleep(60)
        (tmp_path / "went on").touch()

    others = psutil.Process().children()
    with pytest.raises(UserError, match="stream too long") as caught:
        in_processes(work, scatter([0, 1], 2))
    assert not any(tmp_path.iterdir())
    assert "in work" in caught.value.__notes__[0]  # where it happened
    assert isinstance(caught.value.__cause__, RaisedElsewhere)
    assert caught.value.__cause__.places[-1] == (__file__, work.__code__.co_firstlineno + 2)
    assert psutil.Process().children() == others


class Unsendable(Exception):
    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(f"{what} in {where}")


def test_an_error_that_cannot_be_sent_says_what_it_was():
    def fail(part, on_progress):
        raise Unsendable("a fault", where="the child")

    with pytest.raises(RuntimeError, match=r"^Unsendable: a fault in the child") as raised:
        in_processes(fail, [[1], [2]])
    assert "in fail" in raised.value.__notes__[0]


def test_a_killed_process_is_an_error():
    def work(part, on_progress):
        if part[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return part

    with pytest.raises(RuntimeError, match=r"exit code -9 .* runtime\.processes"):
        in_processes(work, scatter([0, 1], 2))


def test_processes_do_not_outlive_a_killed_parent(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        """
import os, sys, time
from dmr_pipeline.rollout.parallel import in_processes

def work(part, advance):
    print(os.getpid(), flush=True)
    for _ in range(600):
        time.sleep(0.1)
        advance(1)

in_processes(work, [[1], [2]])
"""
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_parent_whose_torch_has_worked_with_several_threads_does_not_hang_its_children():
    """OpenMP's threads do not survive a fork, and who has used some waits for them."""
    script = """
import torch
from dmr_pipeline.rollout.parallel import in_processes
torch.set_num_threads(4)
large = torch.ones(2000, 2000)
whole = float(large.exp().sum())
print(in_processes(lambda part, tell: (float(large.exp().sum()) > 0.9 * whole, torch.get_num_threads()), [[1], [2]]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[(True, 1), (True, 1)]"


def test_there_is_one_process_on_a_gpu():
    runtime = Runtime(processes=3)
    assert processes_on(torch.device("cpu"), runtime) == 3
    assert processes_on(torch.device("cuda"), runtime) == 1


def test_threads_and_processes_exclude_each_other():
    Runtime(threads=2, processes=1)
    with pytest.raises(ValueError, match="do not survive a fork"):
        Runtime(threads=2, processes=2)
