"""The games of a recipe: made or dealt once by the stage `benchmark_tasks`."""

import random
from typing import TYPE_CHECKING

from pydantic import JsonValue
from rich.progress import track

from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.official.packing import read_official
from dmr_pipeline.environments.benchmark import SPLITS, split_seeds
from dmr_pipeline.errors import UserError

if TYPE_CHECKING:
    from dmr_pipeline.environments.alfworld.benchmark import GeneratedAlfWorld, OfficialAlfWorld

Dealt = dict[str, tuple[list[Game], dict[str, JsonValue]]]
"""Split -> its games, and what the stage's summary says of them."""


def generated_games(settings: "GeneratedAlfWorld") -> Dealt:
    made: Dealt = {}
    for split in SPLITS:
        seeds = split_seeds(settings, split)
        drawn = [generate_game(seed, settings.step_limit) for seed in track(seeds, description=f"games of {split}")]
        rejected = sum(tries for _, tries in drawn)
        made[split] = (
            [game for game, _ in drawn],
            {"first_seed": seeds.start, "last_seed": seeds.stop - 1, "candidates_rejected": rejected},
        )
    return made


def official_games(settings: "OfficialAlfWorld") -> Dealt:
    """Games of the official splits.

    Raises:
        UserError: the games are not packed, or there are fewer than the splits ask for.
    """
    train, test = read_official("train"), read_official(settings.test_split)
    random.Random(f"alfworld-official-{settings.seed}").shuffle(train)
    chosen: Dealt = {}
    for split in SPLITS:
        source, official_split = (test, settings.test_split) if split == "test" else (train, "train")
        wanted = getattr(settings.splits, split)
        if wanted > len(source):
            raise UserError(
                f"benchmark.splits.{split}: {wanted} games, but official {official_split} has {len(source)} left: ask for fewer"
            )
        chosen[split] = source[:wanted], {"official_split": official_split}
        del source[:wanted]
    return chosen
