"""One computation in several processes at once: with tiny models they use a CPU's cores far better than torch's threads do.

The processes are forked, so that they share the loaded models' memory and nothing has to be sent to them; only what they
return is pickled, from process to process.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

import torch

from dmr_pipeline.errors import RaisedElsewhere
from dmr_pipeline.interrupts import SIGNALS
from dmr_pipeline.recipe.runtime import Runtime

WATCH_SECONDS = 0.5

Item = TypeVar("Item")
Message = TypeVar("Message")
Result = TypeVar("Result")

Work = Callable[[Sequence[Item], Callable[[Message], None]], Result]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_on(device: torch.device, runtime: Runtime) -> int:
    """How many to use: one on a GPU, which does not survive a fork, and where the system cannot fork (Windows)."""
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    return runtime.processes if can_fork and device.type == "cpu" else 1


def scatter(items: Sequence[Item], processes: int) -> list[Sequence[Item]]:
    """The items in at most so many parts, dealt out in turn; none is empty, but for the only part of no items."""
    return [items[first::processes] for first in range(min(processes, len(items)))] or [items]


def gather(results: Sequence[Sequence[Result]]) -> list[Result]:
    """Undoes `scatter` on results that stand in the order of each part's items."""
    count = len(results)
    return [results[i % count][i // count] for i in range(sum(map(len, results)))]


def in_processes(
    work: Work[Item, Message, Result],
    parts: Sequence[Sequence[Item]],
    told: Callable[[Message], None] = lambda _: None,
) -> list[Result]:
    """`work(part, tell)` for each part, each but a single one in a process of its own.

    Changes that `work` makes to objects are lost with its process: what is needed of them must be in its result.

    Args:
        work: uses no GPU, which does not survive a fork. torch has one thread there.
        told: called here with what the processes tell while they work: progress, or results that are not to wait for the end.
            Messages of one process come in the order in which it told them.

    Returns:
        Results in the order of the parts.

    Raises:
        Exception: whatever `work` raised, with its traceback as a note; or what `told` raised.
        BrokenProcessPool: a process was killed.
    """
    if len(parts) == 1:
        return [work(parts[0], told)]
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[int, Any]] = {}
    results: dict[int, Result] = {}
    try:
        for index, part in enumerate(parts):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(work, part, sender, os.getpid()), daemon=True)
            earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child ignores them
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
            sender.close()
            running[receiver] = index, process
        while running:
            for receiver in cast(list[Connection], wait(list(running))):
                index, process = running[receiver]
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    process.join()
                    raise BrokenProcessPool(
                        f"process {process.pid} ended with exit code {process.exitcode} before its work was done;"
                        " if memory ran out, set runtime.processes to 1 or runtime.batch_episodes lower"
                    ) from None
                if kind == "told":
                    told(value)
                elif kind == "failed":
                    error, places = value
                    raise error from RaisedElsewhere(places)
                else:
                    results[index] = value
                    del running[receiver]
                    process.join()
    finally:
        for _, process in running.values():
            process.kill()  # it ignores SIGTERM
            process.join()
    return [results[index] for index in range(len(parts))]


def _child(work: Work[Item, Message, Result], part: Sequence[Item], sender: Connection, parent: int) -> None:
    # Ctrl-C reaches all processes of a terminal's group: one that died of it would look like a fault to the parent, which is
    # to end them.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    torch.set_num_threads(1)  # work that is shared among the parent's threads would wait for ever: they are not here
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def tell(message: Message) -> None:
        sender.send(("told", message))

    try:
        sender.send(("done", work(part, tell)))
    except Exception as error:  # noqa: BLE001 - it is raised again in the parent
        places = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
        sender.send(("failed", (_for_the_parent(error), places)))


def _for_the_parent(error: Exception) -> Exception:
    """Itself, or where it cannot go through a pipe one that says the same; with its traceback as a note."""
    sent: Exception = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its class does when it is copied
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note("".join(traceback.format_exception(error)))
    return sent


def _end_with(parent: int) -> None:
    """A child whose parent was killed ends too: nobody waits for its result."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)
