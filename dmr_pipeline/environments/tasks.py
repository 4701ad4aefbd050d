"""The tasks of the four splits, and what plays them."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.official.packing import read_official
from dmr_pipeline.environments.alfworld.store import read_games_file
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.webshop.tasks import (
    SHOP_FOLDER,
    read_shopping_tasks,
    webshop_texts,
)
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Games, GeneratedAlfWorld, OfficialAlfWorld, WebShop

SPLITS = ("agent_train", "router_train", "validation", "test")
_SEEDS_A_SPLIT = 10_000_000
"""Each split draws from a seed range of its own, so that no two share a game however large they are."""


def split_seeds(benchmark: Games, split: str) -> range:
    start = (benchmark.seed * len(SPLITS) + SPLITS.index(split)) * _SEEDS_A_SPLIT
    return range(start, start + getattr(benchmark.splits, split))


def generated_games(benchmark: GeneratedAlfWorld) -> dict[str, tuple[list[Game], dict[str, Any]]]:
    made = {}
    for split in SPLITS:
        seeds = split_seeds(benchmark, split)
        drawn = [generate_game(seed, benchmark.step_limit) for seed in track(seeds, description=f"games of {split}")]
        rejected = sum(tries for _, tries in drawn)
        facts = {"first_seed": seeds.start, "last_seed": seeds.stop - 1, "candidates_rejected": rejected}
        made[split] = [game for game, _ in drawn], facts
    return made


def official_games(benchmark: OfficialAlfWorld) -> dict[str, tuple[list[Game], dict[str, Any]]]:
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


def read_tasks(folder: Path, split: str, limit: int | None = None) -> Sequence[Task]:
    """The first `limit` tasks of a split, all of them by default."""
    if (folder / SHOP_FOLDER).is_dir():
        return read_shopping_tasks(folder, split, limit)
    return read_games_file(folder / f"{split}.parquet", limit)


def benchmark_texts(folder: Path, benchmark: Games) -> list[str]:
    """Texts that together hold every word that a tokenizer for the benchmark must know.

    Args:
        folder: of the stage `benchmark_tasks`.
    """
    return webshop_texts(folder) if isinstance(benchmark, WebShop) else alfworld_texts()
