"""Stages that write a text."""

import os
from collections.abc import Callable
from dataclasses import replace

from dmr_pipeline.artifacts.stage import Stage, StageContext, StageResult

RolloutRequest = Callable[[StageContext], StageResult]


def write(text: str) -> RolloutRequest:
    def run(context: StageContext) -> StageResult:
        (context.output / "folder").mkdir()
        (context.output / "folder" / "text").write_text(text)
        return StageResult(summary={"length": len(text)}, measured={"pid": os.getpid()})

    return run


def stage(run: RolloutRequest, name: str = "one", inputs: tuple[str, ...] = (), **changes: object) -> Stage:
    base = Stage(name, inputs, ("benchmark",), "1", run, "group", frozenset(), "A stage.", "Read it.")
    return replace(base, **changes)
