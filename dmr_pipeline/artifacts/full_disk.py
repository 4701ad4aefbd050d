"""A full disk is one clear error, whatever library met it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmr_pipeline.errors import FULL, UserError, causes

FULL_DISK_BYTES = 1 << 20


@contextmanager
def disk_full_is_user_error(folder: Path, data_root: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_disk_full(error, data_root):
            raise UserError(
                f"no space left on the disk of {data_root.resolve()} while making {folder}: free some, run again"
            ) from error
        raise


def _is_disk_full(error: BaseException, data_root: Path) -> bool:
    """Also true where a library hides the reason (torch.save does): then the disk itself is asked."""
    for seen in causes(error):
        if (isinstance(seen, OSError) and seen.errno in FULL) or "No space left on device" in str(seen):
            return True
    return data_root.is_dir() and shutil.disk_usage(data_root).free < FULL_DISK_BYTES
