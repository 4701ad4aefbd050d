"""A memory that holds only so many rows."""

import pytest
import torch

from dmr_pipeline.rollout.kv_cache.packed import PackedStreams


def fits(monkeypatch: pytest.MonkeyPatch, rows: int, after_calls: int = 0) -> list[int]:
    """Let a forward pass of more rows than these run out of memory, from some call on; the rows of those that ran."""
    extend, ran = PackedStreams.extend, list[int]()

    def bounded(self, slots, chunks, counts=None):
        if len(ran) >= after_calls and len(slots) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        ran.append(len(slots))
        return extend(self, slots, chunks, counts)

    monkeypatch.setattr(PackedStreams, "extend", bounded)
    return ran
