import errno
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import dagster as dg
import pytest
import requests
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.defs.faults import RETRIES, as_dagster_failures, is_transient
from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout import parallel
from tests.helpers.faulty_job import faulty_job

TRANSIENT = [
    ConnectionResetError(),
    BrokenPipeError(),
    TimeoutError("timed out"),
    socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution"),
    *(OSError(number, os.strerror(number)) for number in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENETUNREACH)),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    BrokenProcessPool("killed"),
]
LASTING = [
    UserError("bad input: mend it"),
    OSError(errno.ENOSPC, "no space left on device"),
    OSError(errno.EDQUOT, "disk quota exceeded"),
    FileNotFoundError(errno.ENOENT, "no such file"),
    PermissionError(errno.EACCES, "permission denied"),
    socket.gaierror(socket.EAI_NONAME, "name or service not known"),
    KeyError("x"),
    TypeError("x"),
    RuntimeError("x"),
    torch.OutOfMemoryError("CUDA out of memory"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_faults_of_machines_and_networks_are_transient(error: BaseException):
    assert is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_another_try_cannot_mend_is_not(error: BaseException):
    assert not is_transient(error)


def test_a_server_that_is_down_is_transient_through_all_layers_of_requests():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(requests.ConnectionError) as caught:
        requests.get(f"http://127.0.0.1:{port}", timeout=5)
    assert is_transient(caught.value)


def test_a_server_that_does_not_answer_is_transient():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(requests.Timeout) as caught,
    ):
        requests.get(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.1)
    assert is_transient(caught.value)


def test_torchs_own_errors_of_use_are_not():
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_transient(caught.value)


def test_a_killed_process_of_a_pool_is_transient():
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(BrokenProcessPool) as caught,
    ):
        pool.submit(signal.raise_signal, signal.SIGKILL).result()
    assert is_transient(caught.value)


def test_a_killed_process_of_a_stage_is_transient():
    def work(part: object, on_progress: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError) as caught:
        parallel.in_processes(work, [[1], [2]])
    assert is_transient(caught.value)


def test_an_error_of_a_stages_process_is_judged_as_itself():
    def work(part: object, on_progress: object) -> None:
        raise OSError(errno.ESTALE, "stale") if part == [1] else ValueError("a bug")

    for parts, expected in (([[1], [1]], True), ([[2], [2]], False)):
        with pytest.raises((OSError, ValueError)) as caught:
            parallel.in_processes(work, parts)
        assert is_transient(caught.value) is expected


def chain(*errors: tuple[BaseException, str]) -> BaseException:
    """The last of the errors, each raised because of the one before it, or while that was handled ("hidden": from None)."""
    below: BaseException | None = None
    for error, link in errors:
        error.__cause__ = below if link == "cause" else None  # this suppresses the context, as `from` does
        error.__context__ = below
        error.__suppress_context__ = link != "context"
        below = error
    assert below is not None
    return below


@given(
    st.sampled_from([*TRANSIENT, *LASTING]),
    st.lists(
        st.tuples(
            st.sampled_from([ValueError, RuntimeError, OSError]),
            st.sampled_from(["cause", "context"]),
        )
    ),
)
def test_wrapping_an_error_changes_nothing(error: BaseException, wrappers: list[tuple[type[Exception], str]]):
    assert is_transient(chain((error, "cause"), *((kind("x"), link) for kind, link in wrappers))) == (
        error in TRANSIENT
    )


def test_the_outermost_verdict_holds():
    assert not is_transient(chain((TimeoutError(), "cause"), (UserError("set another address"), "cause")))
    assert is_transient(chain((UserError("x"), "cause"), (TimeoutError(), "context")))
    assert not is_transient(chain((TimeoutError(), "cause"), (ValueError(), "hidden")))


def test_errors_that_go_round_in_a_circle_come_to_an_end():
    inner = ValueError()
    inner.__cause__ = chain((inner, "cause"), (RuntimeError(), "cause"))
    assert not is_transient(inner)


def test_torch_is_not_imported():
    code = (
        "import sys; from dmr_pipeline.defs import faults; faults.is_transient(RuntimeError());"
        " print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


class Attempts:
    """Materialises in this process an asset that raises these errors, one a try, and counts the tries."""

    def __init__(self, *errors: BaseException) -> None:
        self.made = 0
        self.waits: list[float] = []

        @dg.asset(retry_policy=RETRIES)
        def stage(context: dg.AssetExecutionContext) -> None:
            with as_dagster_failures(context):
                self.made += 1
                if self.made <= len(errors):
                    raise errors[self.made - 1]

        self.asset = stage

    def materialize(self) -> dg.ExecuteInProcessResult:
        with dg.DagsterInstance.ephemeral() as instance:
            try:
                return dg.materialize([self.asset], instance=instance)
            finally:
                (run,) = instance.get_runs()
                self.waits = [
                    entry.dagster_event.step_retry_data.seconds_to_wait
                    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY)
                ]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps to the end of each wait."""
    from dagster._core.execution.plan import active

    class Timings:
        now = 0.0

        def time(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    monkeypatch.setattr(active, "time", Timings())


@pytest.mark.usefixtures("no_waiting")
def test_transient_faults_are_tried_again_after_growing_waits():
    attempts = Attempts(ConnectionResetError(), TimeoutError())
    assert attempts.materialize().success
    assert attempts.made == 3
    assert attempts.waits == [30, 90]


@pytest.mark.usefixtures("no_waiting")
def test_a_fault_that_stays_ends_the_run_as_itself():
    errors = [ConnectionResetError(f"try {number}") for number in range(9)]
    attempts = Attempts(*errors)
    with pytest.raises(dg.Failure, match="ConnectionResetError: try 3") as caught:
        attempts.materialize()
    assert attempts.made == 4
    assert attempts.waits == [30, 90, 210]
    assert caught.value.__cause__ is errors[3]


@pytest.mark.parametrize(
    ("error", "description"),
    [
        (
            UserError("the game folder is empty: give another"),
            "the game folder is empty: give another",
        ),
        (OSError(errno.ENOSPC, "no space left"), "OSError: [Errno 28] no space left"),
        (TypeError("a bug"), "TypeError: a bug"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (dg.DagsterExecutionInterruptedError(), "DagsterExecutionInterruptedError: "),
    ],
    ids=repr,
)
def test_what_another_try_cannot_mend_is_tried_once(error: BaseException, description: str):
    attempts = Attempts(error)
    with pytest.raises(dg.Failure) as caught:
        attempts.materialize()
    assert attempts.made == 1
    assert caught.value.description == description
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("kind", "times", "tries"),
    [
        ("killed", 2, 3),
        ("killed", 9, 4),
        ("lost connection", 1, 2),
        ("bad input", 9, 1),
        ("interrupt", 9, 1),
    ],
)
def test_tries_in_processes_of_their_own(tmp_path: Path, kind: str, times: int, tries: int):
    log = tmp_path / "tries"
    with (
        dg.DagsterInstance.local_temp(str(tmp_path)) as instance,
        dg.execute_job(
            dg.reconstructable(faulty_job),
            instance,
            run_config={
                "execution": {"config": {"multiprocess": {"max_concurrent": 1}}},
                "ops": {"faulty": {"config": {"tries": str(log), "kind": kind, "times": times}}},
            },
        ) as result,
    ):
        assert result.success is (times < tries)
    assert log.read_text().split() == [str(number) for number in range(tries)]
