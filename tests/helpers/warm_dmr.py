"""`dmr` on the fake stages, each call a fork of a process that has imported what takes seconds: for a campaign of kills.

Reads calls from standard input, a line of JSON each, and answers each with two lines: the call's process, and its exit code.
A call can be told to stop at the n-th moment of some kind: it says so, and goes on when a file is there.
"""

import atexit
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

REACHED = "the moment is there\n"
STACKS = signal.SIGUSR1
"""Has a call say where its threads are."""
PATIENCE_SECONDS = 60
WRITING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "shutil.rmtree", "os.truncate")
ANYTHING = ""


@dataclass(frozen=True)
class Call:
    arguments: list[str]
    folder: str
    """Where its standard output and error go, as `out` and `err`, and where the file `go` lets it go on."""
    within: str = ANYTHING
    """`module:function`, to count what is about to be written or removed within it; else whatever Python audits."""
    number: int = 0
    """The moment to stop at; 0: none, and at its end it tells how many there were."""


def serve() -> Callable[[], None]:
    """Returns, in each call's process alone, what it is to do."""
    import dvc.repo
    import dvc.repo.stage
    import great_expectations

    from dmr_pipeline import __main__, pipeline
    from dmr_pipeline.cli import stages
    from dmr_pipeline.defs import runs
    from dmr_pipeline.ingestion import inbox as ingestion
    from dmr_pipeline.rollout import parallel
    from tests.helpers.fake_project import fake_run, fake_stages

    assert all((dvc.repo.stage, great_expectations, ingestion, runs))
    assert threading.active_count() == 1, "a fork would lose threads"

    def play(part: Sequence[int], on_progress: Callable[[int], None]) -> None:
        for _ in range(3):
            time.sleep(0.02)
            on_progress(1)

    def run(context: Any) -> Any:
        parallel.in_processes(play, [[1], [2]])
        return fake_run(context)

    real = {stage.name: stage for stage in pipeline.STAGES}
    pipeline.STAGES = tuple(
        real[stage.name] if stage.name == "ingested_trajectories" else replace(stage, run=run)
        for stage in fake_stages()
    )
    stages._show_report = lambda recipe: None  # the fake stages make no whole one
    for line in sys.stdin:
        call = Call(**json.loads(line))
        process = os.fork()
        if process == 0:
            os.setsid()
            for name, descriptor in (("out", 1), ("err", 2)):
                os.dup2(os.open(f"{call.folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            faulthandler.register(STACKS, file=sys.stderr)
            count_moments(call)
            sys.argv = ["dmr", *call.arguments]
            return __main__.main
        answer(process)
        answer(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    return lambda: None


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def count_moments(call: Call) -> None:
    own, go, counted, inside = os.getpid(), Path(call.folder, "go"), [0], threading.local()

    def at(event: str, arguments: tuple[Any, ...]) -> None:
        if os.getpid() != own or counted[0] < 0 or not (call.within == ANYTHING or getattr(inside, "now", False)):
            return
        if call.within != ANYTHING and event not in WRITING and not (event == "open" and writes(arguments[2])):
            return
        counted[0] += 1
        if counted[0] == call.number:
            counted[0] = -1
            os.write(1, REACHED.encode())
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not os.access(go, os.F_OK) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)

    if call.within != ANYTHING:
        module, name = call.within.split(":")
        owner = importlib.import_module(module)
        inner = getattr(owner, name)

        def outer(*positional: Any, **named: Any) -> Any:
            inside.now = True
            try:
                return inner(*positional, **named)
            finally:
                inside.now = False

        setattr(owner, name, outer)
    if not call.number:
        atexit.register(lambda: Path(call.folder, "moments").write_text(str(counted[0])))
    sys.addaudithook(at)


def writes(flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


def line_of(call: Call) -> str:
    return json.dumps(asdict(call)) + "\n"


if __name__ == "__main__":
    serve()()
