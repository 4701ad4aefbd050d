"""What this machine has besides memory."""

import shutil
from pathlib import Path


def free_disk(folder: Path) -> int:
    """Bytes for a folder that need not exist."""
    while not folder.is_dir():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
