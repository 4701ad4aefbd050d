"""The code location with the fake project's stages, as the processes of a Ray cluster load it."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import dagster as dg

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.defs import faults
from tests.helpers.fake_project import fake_run, fake_stages

SLEEPER = "quantized_checkpoints"
NODE_VARIABLE = "DMR_TEST_NODE"
SHARED_VARIABLE = "DMR_TEST_SHARED"


def recorded_run(context: StageContext) -> StageResult:
    """Writes down where and when it ran. The first try of `SLEEPER` waits to be killed."""
    shared, started = Path(os.environ[SHARED_VARIABLE]), time.time()
    stage, recipe = context.output.name.removeprefix(".").removesuffix(".new"), context.recipe.name
    result = fake_run(context)
    if stage == SLEEPER:
        pid = shared / f"{recipe}.pid"
        if not pid.exists():
            part = pid.with_suffix(".part")
            part.write_text(str(os.getpid()))
            part.rename(pid)
            time.sleep(600)
    record = {
        "stage": stage,
        "recipe": recipe,
        "node": os.environ[NODE_VARIABLE],
        "folder": str(Path.cwd()),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "started": started,
        "finished": time.time(),
    }
    (shared / f"{recipe}.{stage}.json").write_text(json.dumps(record))
    return result


@dg.definitions
def defs() -> dg.Definitions:
    faults.RETRIES = faults.RETRIES._replace(delay=0)
    pipeline.STAGES = tuple(replace(stage, run=recorded_run) for stage in fake_stages())
    from dmr_pipeline.definitions import defs as real_defs

    return real_defs()
