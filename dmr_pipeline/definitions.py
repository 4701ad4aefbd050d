"""Dagster's code location: the pipeline table as assets, their checks, and one job over all of them."""

import dagster as dg

from dmr_pipeline import pipeline
from dmr_pipeline.defs.assets import build_assets
from dmr_pipeline.defs.checks import build_checks


@dg.definitions
def defs() -> dg.Definitions:
    whole_pipeline = dg.define_asset_job(
        "whole_pipeline", selection=dg.AssetSelection.all(), description="One recipe, from its games to its report."
    )
    return dg.Definitions(assets=build_assets(pipeline.STAGES), asset_checks=build_checks(), jobs=[whole_pipeline])
