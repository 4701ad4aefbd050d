"""The most memory that a process has held."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_SECONDS = 0.5
_SHARE = 0.02
"""Of the time, to look in where nothing grows: Linux goes through all pages, which takes a third of a second for the processes of
a small LLM."""
_GROWN = 1.01
"""Times what was resident at most, that is looked at at once."""
_OWN = ("Pss_Anon:", "Pss_Shmem:")


def peak_bytes() -> int:
    """Of this program so far, as Linux tells it. (`ru_maxrss` is no less than that of the process that started it.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@dataclass
class Peak:
    """The most that was found so far."""

    bytes: int | None = None
    """None where the system does not tell."""


@contextmanager
def watched_memory() -> Iterator[Peak]:
    """Look at what this process and its children hold together, pages of files aside, which the system takes back where it needs
    them. What children share with it counts once. Twice a second where what is resident has grown, which costs nothing to see;
    else less often where looking takes long."""
    peak, ended = Peak(), threading.Event()

    def look() -> float:
        started = time.monotonic()
        held = own_bytes()
        if held is not None:
            peak.bytes = max(peak.bytes or 0, held)
        return time.monotonic() - started

    def watch(resident: int, took: float) -> None:
        due = time.monotonic() + took / _SHARE
        while not ended.wait(_SECONDS):
            now = _resident()
            if now > _GROWN * resident or time.monotonic() > due:
                resident, took = max(resident, now), look()
                due = time.monotonic() + took / _SHARE

    watcher = threading.Thread(target=watch, args=(_resident(), look()), daemon=True)
    watcher.start()
    try:
        yield peak
        look()
    finally:
        ended.set()
        watcher.join()


def _resident() -> int:
    """Bytes in memory of this process and its children, what they share once for each."""
    total = 0
    for process in _processes():
        with suppress(psutil.Error):  # it has ended, or is another user's
            total += process.memory_info().rss
    return total


def _processes() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def own_bytes() -> int | None:
    """What this process and its children hold now, as `watched_memory` counts it."""
    if not Path("/proc/self/smaps_rollup").is_file():
        return None
    return sum(_held(process.pid) for process in _processes())


def _held(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is another user's
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_OWN))
