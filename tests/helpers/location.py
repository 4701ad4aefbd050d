"""A code location for tests, which Dagster loads in a fake project: the real definitions over stages that take no time.

What differs from `fake_stages`: new trajectories are really ingested, the labels say how many of their steps they have
seen, the report has a picture that a browser can draw, and in the recipe `SPOILT` trajectories are damaged.
"""

from dataclasses import replace

import dagster as dg
import polars as pl
from PIL import Image

from dmr_pipeline import definitions, pipeline
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.stage import Stage, StageContext, StageResult
from dmr_pipeline.ingestion.stored import STAGE as INGESTION
from tests.helpers.fake_project import fake_run, fake_stages

SPOILT = "spoilt"
PICTURE_SIZE = (321, 123)
"""Width and height of the report's picture in pixels."""


def trajectories(context: StageContext) -> StageResult:
    result = fake_run(context)
    if context.recipe.name == SPOILT:
        file = context.output / "steps.parquet"
        steps = pl.read_parquet(file)
        pl.concat([steps, steps]).write_parquet(file)  # a check says that every step is there once
    return result


def sensitivity_dataset(context: StageContext) -> StageResult:
    result = fake_run(context)
    steps = verify(context.inputs[INGESTION]).manifest.summary["steps"]
    return replace(result, summary={**result.summary, "ingested_steps": steps})


def evaluation_report(context: StageContext) -> StageResult:
    result = fake_run(context)
    Image.radial_gradient("L").resize(PICTURE_SIZE).save(context.output / "plots" / "cost.png")
    return result


FUNCTIONS = {function.__name__: function for function in (trajectories, sensitivity_dataset, evaluation_report)}


def stages() -> tuple[Stage, ...]:
    real = {stage.name: stage for stage in pipeline.STAGES}
    return tuple(
        real[INGESTION] if stage.name == INGESTION else replace(stage, run=FUNCTIONS.get(stage.name, stage.run))
        for stage in fake_stages()
    )


@dg.definitions
def defs() -> dg.Definitions:
    pipeline.STAGES = stages()  # in Dagster's own processes, which end with the test
    return definitions.defs()
