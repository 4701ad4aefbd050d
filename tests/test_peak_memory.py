import mmap
import os
import signal
import time
from pathlib import Path

import pytest

from dmr_pipeline import peak_memory
from dmr_pipeline.peak_memory import own_bytes, watched_memory

MB = 1 << 20
pytestmark = pytest.mark.skipif(own_bytes() is None, reason="the system does not tell what a process holds")


def test_what_was_held_for_a_while_is_found() -> None:
    before = own_bytes()
    assert before is not None
    with watched_memory() as peak:
        held = bytearray(200 * MB)
        time.sleep(1.2)
        del held
    assert peak.bytes is not None
    assert 190 * MB < peak.bytes - before < 260 * MB


def test_looking_takes_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def slow() -> int:
        looks.append(time.monotonic())
        time.sleep(0.1)
        return MB

    monkeypatch.setattr(peak_memory, "own_bytes", slow)
    with watched_memory() as peak:
        time.sleep(3)
    assert peak.bytes == MB
    assert len(looks) == 2, "at the start and at the end"


def test_what_grows_is_looked_at_however_long_looking_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    look = peak_memory.own_bytes

    def slow() -> int | None:
        time.sleep(0.1)
        return look()

    monkeypatch.setattr(peak_memory, "own_bytes", slow)
    before = own_bytes()
    assert before is not None
    with watched_memory() as peak:
        time.sleep(0.5)
        held = bytearray(200 * MB)
        time.sleep(1.2)
        del held
    assert peak.bytes is not None
    assert peak.bytes - before > 190 * MB


def test_what_a_child_shares_counts_once_and_its_own_counts_too() -> None:
    shared = bytearray(200 * MB)
    before = own_bytes()
    assert before is not None
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        own = bytearray(100 * MB)
        os.write(tell, b"x")
        time.sleep(30)
        os._exit(len(own) and 0)
    assert os.read(told, 1) == b"x"
    try:
        found = own_bytes()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert found is not None
    assert 90 * MB < found - before < 180 * MB
    assert len(shared) == 200 * MB


def test_pages_of_files_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100 * MB))
    before = own_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        found = own_bytes()
    assert before is not None
    assert found is not None
    assert found - before < 30 * MB
