"""Stage `benchmark_tasks`: the tasks of the four splits, written once and read by every later stage."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.alfworld.store import write_games
from dmr_pipeline.environments.tasks import generated_games, official_games
from dmr_pipeline.environments.webshop.tasks import (
    deal_goals,
    make_shop,
    write_goals,
)
from dmr_pipeline.recipe import OfficialAlfWorld, WebShop


def benchmark_tasks(context: StageContext) -> StageResult:
    benchmark = context.recipe.benchmark
    if isinstance(benchmark, WebShop):
        return _webshop_tasks(benchmark, context.output)
    chosen = official_games(benchmark) if isinstance(benchmark, OfficialAlfWorld) else generated_games(benchmark)
    summary = {}
    for split, (games, facts) in chosen.items():
        write_games(games, context.output / f"{split}.parquet")
        summary[split] = _split_summary([game.task_type for game in games], facts)
    return StageResult(summary=summary)


def _webshop_tasks(benchmark: WebShop, output: Path) -> StageResult:
    goals, facts = make_shop(benchmark, output)
    summary: dict[str, Any] = {"goals": len(goals), **facts}
    for split, (dealt, split_facts) in deal_goals(goals, benchmark, output).items():
        write_goals(dealt, output / f"{split}.parquet")
        summary[split] = _split_summary([goal.category for goal in dealt], split_facts)
    return StageResult(summary=summary)


def _split_summary(task_types: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
    return {"games": len(task_types), **facts, "by_task_type": dict(sorted(Counter(task_types).items()))}
