"""Resume state in a stage's scratch folder: written whole, checked when it is read, and dropped where it is damaged, so that
the stage starts anew rather than from other numbers."""

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dmr_pipeline.atomic import replaced

log = logging.getLogger(__name__)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state whole, in place of the one before.

    Args:
        state: tensors, numbers, strings, and lists, tuples and dictionaries of them.
    """
    with replaced(path) as part:
        torch.save(dict(state), part)


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """What `save_state` wrote; None where there is nothing, or nothing that can be used. Executes nothing of the file."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and does not read them
            damaged = archive.testzip()
        if damaged is None:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            return state
    except (zipfile.BadZipFile, UnpicklingError, RuntimeError, ValueError, EOFError):
        pass
    discard(path)
    return None


def discard(path: Path) -> None:
    """Remove resume state that cannot be used."""
    log.warning("%s: this resume state is damaged, or of another version: it is dropped and its work done again", path)
    path.unlink()
