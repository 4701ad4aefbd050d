"""Stage `benchmark_tasks`: the games of the four splits, written once and read by every later stage."""

from collections import Counter
from pathlib import Path

import polars as pl
from rich.progress import track

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.base import Episode, Task
from dmr_pipeline.recipe import Benchmark
from dmr_pipeline.stage import StageContext, StageResult

SPLITS = ("agent_train", "router_train", "validation", "test")
_SEEDS_A_SPLIT = 10_000_000
"""Each split draws from a seed range of its own, so that no two share a game however large they are."""


def split_seeds(benchmark: Benchmark, split: str) -> range:
    start = (benchmark.seed * len(SPLITS) + SPLITS.index(split)) * _SEEDS_A_SPLIT
    return range(start, start + getattr(benchmark.splits, split))


def benchmark_tasks(context: StageContext) -> StageResult:
    benchmark = context.recipe.benchmark
    summary = {}
    for split in SPLITS:
        seeds = split_seeds(benchmark, split)
        games, rejected = [], 0
        for seed in track(seeds, description=f"games of {split}"):
            game, tries = generate_game(seed, benchmark.step_limit)
            games.append(game)
            rejected += tries
        write_games(games, context.output / f"{split}.parquet")
        summary[split] = {
            "games": len(games),
            "first_seed": seeds.start,
            "last_seed": seeds.stop - 1,
            "candidates_rejected": rejected,
            "by_task_type": dict(sorted(Counter(game.task_type for game in games).items())),
        }
    return StageResult(summary=summary)


def write_games(games: list[Game], path: Path) -> None:
    """One row a game: id, task type, instruction, and the game itself as JSON."""
    pl.DataFrame(
        {
            "task_id": [game.task_id for game in games],
            "task_type": [game.task_type for game in games],
            "instruction": [game.instruction for game in games],
            "game": [game.model_dump_json() for game in games],
        }
    ).write_parquet(path, compression="zstd")


def read_games(folder: Path, split: str, limit: int | None = None) -> list[Game]:
    """The first `limit` games of a split, all of them by default."""
    rows = pl.read_parquet(folder / f"{split}.parquet", columns=["game"])
    return [Game.model_validate_json(game) for game in rows.head(limit or len(rows))["game"]]


def begin_episode(task: Task) -> Episode:
    """An episode in the environment that the task belongs to."""
    if isinstance(task, Game):
        return AlfWorldEpisode(task)
    raise TypeError(f"no environment plays {type(task).__name__}")
