"""Stage `benchmark_tasks`: the games of the four splits, written once and read by every later stage."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

from rich.progress import track

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.official import read_official
from dmr_pipeline.environments.alfworld.store import read_games_file, write_games
from dmr_pipeline.environments.base import Episode, Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Games, GeneratedAlfWorld, OfficialAlfWorld
from dmr_pipeline.stage import StageContext, StageResult

SPLITS = ("agent_train", "router_train", "validation", "test")
_SEEDS_A_SPLIT = 10_000_000
"""Each split draws from a seed range of its own, so that no two share a game however large they are."""


def benchmark_tasks(context: StageContext) -> StageResult:
    benchmark = context.recipe.benchmark
    chosen = _official_games(benchmark) if isinstance(benchmark, OfficialAlfWorld) else _generated_games(benchmark)
    summary = {}
    for split, (games, facts) in chosen.items():
        write_games(games, context.output / f"{split}.parquet")
        by_task_type = dict(sorted(Counter(game.task_type for game in games).items()))
        summary[split] = {"games": len(games), **facts, "by_task_type": by_task_type}
    return StageResult(summary=summary)


def split_seeds(benchmark: Games, split: str) -> range:
    start = (benchmark.seed * len(SPLITS) + SPLITS.index(split)) * _SEEDS_A_SPLIT
    return range(start, start + getattr(benchmark.splits, split))


def _generated_games(benchmark: GeneratedAlfWorld) -> dict[str, tuple[list[Game], dict[str, Any]]]:
    made = {}
    for split in SPLITS:
        seeds = split_seeds(benchmark, split)
        drawn = [generate_game(seed, benchmark.step_limit) for seed in track(seeds, description=f"games of {split}")]
        rejected = sum(tries for _, tries in drawn)
        facts = {"first_seed": seeds.start, "last_seed": seeds.stop - 1, "candidates_rejected": rejected}
        made[split] = [game for game, _ in drawn], facts
    return made


def _official_games(benchmark: OfficialAlfWorld) -> dict[str, tuple[list[Game], dict[str, Any]]]:
    """Raises: UserError: the games are not packed, or there are fewer than the splits ask for."""
    train, test = read_official("train"), read_official(benchmark.test_split)
    random.Random(f"alfworld-official-{benchmark.seed}").shuffle(train)
    chosen = {}
    for split in SPLITS:
        source, official_split = (test, benchmark.test_split) if split == "test" else (train, "train")
        wanted = getattr(benchmark.splits, split)
        if wanted > len(source):
            raise UserError(
                f"benchmark.splits.{split}: {wanted} games, but official {official_split} has {len(source)} left: ask for fewer"
            )
        chosen[split] = source[:wanted], {"official_split": official_split}
        del source[:wanted]
    return chosen


def read_tasks(folder: Path, split: str, limit: int | None = None) -> list[Game]:
    """The first `limit` games of a split, all of them by default."""
    return read_games_file(folder / f"{split}.parquet", limit)


def begin_episode(task: Task) -> Episode:
    """An episode in the environment that the task belongs to."""
    if isinstance(task, Game):
        return AlfWorldEpisode(task)
    raise TypeError(f"no environment plays {type(task).__name__}")
