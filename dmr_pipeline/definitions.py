"""Dagster's code location: the pipeline table as assets, their checks, and what starts runs of them."""

import dagster as dg

from dmr_pipeline import pipeline
from dmr_pipeline.defs.assets import build_assets
from dmr_pipeline.defs.automation import (
    build_trajectory_sensor,
    build_weekly_schedule,
    ingest,
    retrain,
    whole_pipeline,
)
from dmr_pipeline.defs.checks import build_checks
from dmr_pipeline.defs.executors import enter_home, executor
from dmr_pipeline.defs.sections import build_section_sensor
from dmr_pipeline.recipe import UNHASHED_SECTIONS, Recipe
from dmr_pipeline.recipe.reading import recipe_names


@dg.definitions
def defs() -> dg.Definitions:
    enter_home()  # first: the recipes, which are the partitions, are read from there
    recipes = recipe_names()
    sections = sorted(Recipe.model_fields.keys() - UNHASHED_SECTIONS - {"name"})
    return dg.Definitions(
        assets=build_assets(pipeline.STAGES),
        asset_checks=build_checks([stage.name for stage in pipeline.STAGES]),
        jobs=[whole_pipeline, ingest, retrain],
        sensors=[build_section_sensor(sections), build_trajectory_sensor(recipes)],
        schedules=[build_weekly_schedule(recipes)],
        executor=executor(),
    )
