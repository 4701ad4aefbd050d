"""Stage `ingested_trajectories` (stub)."""

from collections.abc import Sequence
from pathlib import Path

from dmr_pipeline.stage import StageContext, StageResult


def ingested_trajectories(context: StageContext) -> StageResult:
    return StageResult(summary={"files": 0, "episodes": 0, "steps": 0})


def waiting_files(data_root: Path, recipe: str) -> Sequence[Path]:
    return []


def file_away(data_root: Path, recipe: str) -> None:
    pass
