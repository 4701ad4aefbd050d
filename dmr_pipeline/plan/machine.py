"""What this machine, or the container, has left."""

import os
import shutil
from pathlib import Path

import psutil
import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""A container's limit and what is used of it, in versions 2 and 1."""


def free_memory() -> int:
    """Bytes of main memory that a new program may take."""
    free = psutil.virtual_memory().available
    for limit, used in _CGROUPS:
        if Path(limit).is_file() and (said := Path(limit).read_text().strip()).isdigit():
            free = min(free, int(said) - int(Path(used).read_text()))
    return max(free, 0)


def free_gpu(device: torch.device) -> int:
    """Bytes of the GPU's memory that are free; 0 on a CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def free_disk(folder: Path) -> int:
    """Bytes for a folder that need not exist."""
    while not folder.is_dir():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
