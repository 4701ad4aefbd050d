"""Dagster's side of the pipeline; nothing else in the package knows Dagster."""

import os

os.environ["GX_ANALYTICS_ENABLED"] = "False"  # Great Expectations reads it while it is imported
