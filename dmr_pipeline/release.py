"""Stage `released_router` (stub)."""

from dmr_pipeline.stage import StageContext, StageResult


def released_router(context: StageContext) -> StageResult:
    (context.output / "releases.json").write_text("{}")
    return StageResult(summary={})
