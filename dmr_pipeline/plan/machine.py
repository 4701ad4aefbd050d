"""What this machine has besides memory."""

import os
import shutil
from pathlib import Path


def free_disk(folder: Path) -> int:
    """Bytes for a folder that need not exist."""
    while not folder.is_dir():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
