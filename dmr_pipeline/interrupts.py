"""Ctrl-C and SIGTERM end the process at once, in one line; a short piece of work can hold them back.

A handler that raises an exception does not end a program for sure: raised inside a callback, as of a fork or a weak
reference, it is swallowed, and a library may take it for a fault of its own. And nothing needs to be unwound: whatever is
written here is written whole or not at all, and resumed, as after SIGKILL. So the work goes on in a thread of its own, and
the main thread only waits, for its end or for a signal.
"""

import contextvars
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

import psutil

Result = TypeVar("Result")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LINE = "interrupted: run the same command again to resume\n"
POLL_SECONDS = 0.1
FAREWELL_SECONDS = 5.0
STACK_BYTES = 64 << 20  # macOS gives a thread half a megabyte

_at_work = threading.Lock()
"""Held by what must not be cut short."""
_farewells: list[Callable[[], None]] = []


def in_thread(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; on SIGINT or SIGTERM the process ends, with exit code 128 + the signal's number.

    Its children are killed. A signal that the process was started to ignore stays ignored. To be called from the main
    thread.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised again in the main thread
            outcome.set_exception(error)

    with _handlers(note):
        usual = threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
        thread.start()
        threading.stack_size(usual)
        while thread.is_alive() and not received:
            thread.join(POLL_SECONDS)
        if received:
            _end(received[0])
    return outcome.result()


@contextmanager
def held_back() -> Iterator[None]:
    """An interrupt is handled only after this block, which should be short: in the main thread by the handlers of before."""
    if threading.current_thread() is not threading.main_thread():
        with _at_work:
            yield
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    try:
        with _handlers(note):
            yield
    finally:
        for number in received:
            signal.raise_signal(number)


@contextmanager
def farewell(last: Callable[[], None]) -> Iterator[None]:
    """Where an interrupt ends the process within this block, `last` is called first, and given up on after some seconds."""
    _farewells.append(last)
    try:
        yield
    finally:
        _farewells.remove(last)


def end_at_once() -> None:
    """From here on SIGINT and SIGTERM end the process, until `in_thread` is called: for its start, while it imports."""

    def end(number: int, frame: FrameType | None) -> None:
        _end(number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def ignore() -> None:
    """Where an exit code stands: an interpreter that winds up would die of a signal without a word."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])


def _end(number: int) -> NoReturn:
    ignore()  # a second signal would come in here again, and wait for itself
    with _at_work:
        logging.disable()  # what fails because its processes are killed is no news
        threading.excepthook = lambda _: None
        _kill_children()
        last = threading.Thread(target=lambda: [say() for say in _farewells], daemon=True)
        last.start()
        last.join(FAREWELL_SECONDS)
        _kill_children()
        try:
            shown = sys.stderr.isatty()
            sys.stderr.write(f"\x1b[?25h\n{LINE}" if shown else LINE)  # a progress bar hides the cursor
            sys.stderr.flush()
            sys.stdout.flush()
        finally:  # also where nobody reads any more
            os._exit(128 + number)


def _kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.Error:  # it has ended, or has become another user's: the process ends all the same
            continue
