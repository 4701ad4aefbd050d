"""What happens where a GPU's memory does not suffice: fewer episodes at once, and where that does not help, one clear line; and
what is done so that the machine's own suffices."""

import ctypes
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from dmr_pipeline.errors import UserError

log = logging.getLogger(__name__)

_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Folder, a container's limit, what is used of it, and what names in `memory.stat` begin with, in versions 2 and 1."""
_WORTH_GIVING_BACK = 1 << 18
"""Bytes of a tensor: it takes the system some milliseconds to look for what is free."""

T = TypeVar("T")
Item = TypeVar("Item")


def free_memory(device: torch.device) -> int:
    """Bytes that are free there: on the GPU; or in main memory, as far as the container may take it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    for folder, limit, used, of_all in _CGROUPS:
        there = Path(folder)
        if (there / limit).is_file() and (said := (there / limit).read_text().strip()).isdigit():
            held = int((there / used).read_text()) - _pages_of_files(there / "memory.stat", of_all)
            free = min(free, int(said) - held)
    return max(free, 0)


def _pages_of_files(stat: Path, of_all: str) -> int:
    """Bytes of files that were read or written and are still held: they count as used, and go where memory is wanted."""
    if not stat.is_file():
        return 0
    counts = dict(line.split() for line in stat.read_text().splitlines())
    return sum(int(counts.get(f"{of_all}{kind}_file", 0)) for kind in ("inactive", "active"))


def halving(count: int, what: str, work: Callable[[int], T]) -> T:
    """`work(count)`, with half the count, down to 1, whenever the GPU's memory does not suffice.

    For work whose result does not depend on the count but for rounding: how many rows go through a model at once.

    Args:
        count: rows at once, at least 1.
        what: of what, in the plural, for the log and the error: "episodes".

    Raises:
        UserError: not even one fits.
    """
    while True:
        try:
            return work(count)
        except torch.OutOfMemoryError as error:
            if count == 1:
                raise UserError(
                    f"the GPU's memory does not suffice for one of the {what} at a time: choose a smaller model or shorter"
                    " episodes (benchmark.step_limit), free the GPU of other programs, or act on runtime.device: cpu"
                ) from error
        # Out of the handler, whose traceback held the tensors of the failed try.
        torch.cuda.empty_cache()
        log.warning("out of GPU memory with %d %s at once: going on with %d", count, what, count // 2)
        count //= 2


def in_pieces(items: Sequence[Item], size: int, what: str, work: Callable[[Sequence[Item]], Sequence[T]]) -> list[T]:
    """`work` on so many items at once, fewer from where the GPU's memory does not suffice; its results one after the other.

    Args:
        what: the items, as for `halving`.

    Raises:
        UserError: not even one fits.
    """
    results: list[T] = []
    first = 0
    while first < len(items):

        def attempt(count: int, first: int = first) -> tuple[int, Sequence[T]]:
            return count, work(items[first : first + count])

        size, found = halving(size, what, attempt)
        results += found
        first += size
    return results


@contextmanager
def out_of_memory_names(knob: str) -> Iterator[None]:
    """Around a training, in which the batch is part of the result and cannot be halved.

    Args:
        knob: what to make smaller, a field of the recipe.

    Raises:
        UserError: the GPU's memory does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory does not suffice for this training: make {knob} smaller, free the GPU of other programs,"
            " or train on runtime.device: cpu"
        ) from error


@cache
def _libc() -> str:
    return platform.libc_ver()[0]


def give_back_freed(after: int) -> None:
    """Give memory that is free within the process back to the system. glibc keeps what lies between tensors that are still
    used: of a model that is quantized layer by layer, more than its integers take.

    Args:
        after: bytes of the tensor that the work was about; nothing is done for a small one.
    """
    if after >= _WORTH_GIVING_BACK and _libc() == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
