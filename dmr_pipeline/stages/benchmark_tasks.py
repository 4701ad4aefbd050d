"""Stage `benchmark_tasks`: the tasks of the four splits, written once and read by every later stage."""

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of


def benchmark_tasks(context: StageContext) -> StageResult:
    return StageResult(summary=benchmark_of(context.recipe.benchmark).make_tasks(context.output))
