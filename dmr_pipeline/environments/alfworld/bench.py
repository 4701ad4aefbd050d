"""How quick is the engine? The official one plays the same commands in the same run, game by game, in a process of its own."""

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.official.engine import OfficialEpisode
from dmr_pipeline.environments.alfworld.official.reading import read_game
from dmr_pipeline.environments.alfworld.official.verify import GAMES_A_PROCESS
from dmr_pipeline.environments.vector import TextVectorEnv

_REPEATS = 20
"""Ours is timed so many times over, since once is over before the clock has moved much."""
_SCALING_S = 1.0


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    load: float
    """From an official file to an episode."""
    reset: float
    """To the first observation and the admissible commands."""
    step: float
    """Mean of a walk, admissible commands included."""


def timings(paths: Sequence[Path], steps: int, *, official: bool) -> Iterator[tuple[Timing, Timing | None]]:
    """Ours and the official engine's (None without `official`), game by game."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=GAMES_A_PROCESS) as pool:
        for path in paths:
            yield pool.apply(_timings, (path, steps, official))


def _timings(path: Path, steps: int, official: bool) -> tuple[Timing, Timing | None]:
    commands = _walk(path, steps)
    ours = [_timing(lambda: AlfWorldEpisode(read_game(path)), commands) for _ in range(_REPEATS)]
    timing = Timing(*(median(getattr(one, field) for one in ours) for field in ("load", "reset", "step")))
    return timing, _timing(lambda: OfficialEpisode(path), commands) if official else None


def _walk(path: Path, steps: int) -> list[str]:
    rng, episode = random.Random(path.as_posix()), AlfWorldEpisode(read_game(path))
    commands = []
    for _ in range(steps):
        commands.append(rng.choice(episode.admissible_commands()))
        episode.step(commands[-1])
    return commands


def _timing(load: Callable[[], AlfWorldEpisode | OfficialEpisode], commands: Sequence[str]) -> Timing:
    clock = [time.perf_counter()]
    episode = load()
    clock.append(time.perf_counter())
    episode.first_observation()
    episode.admissible_commands()
    clock.append(time.perf_counter())
    for command in commands:
        episode.step(command)
        episode.admissible_commands()
    clock.append(time.perf_counter())
    load_s, reset_s, walk_s = (after - before for before, after in pairwise(clock))
    return Timing(load_s, reset_s, walk_s / len(commands))


def packed_load_seconds(packed: str) -> float:
    """From a row of a packed Parquet file to an episode."""
    started = time.perf_counter()
    for _ in range(_REPEATS):
        AlfWorldEpisode(Game.model_validate_json(packed))
    return (time.perf_counter() - started) / _REPEATS


def memory_bytes(packed: Sequence[str], environments: int) -> int:
    """What `environments` live episodes take, each with a game of its own in memory, a few steps in."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory_bytes, (packed, environments))


def _memory_bytes(packed: Sequence[str], environments: int) -> int:
    def live(number: int) -> AlfWorldEpisode:
        episode, rng = AlfWorldEpisode(Game.model_validate_json(packed[number % len(packed)])), random.Random(number)
        for _ in range(5):
            episode.step(rng.choice(episode.admissible_commands()))
        return episode

    live(0)
    before = psutil.Process().memory_info().rss
    kept = [live(number) for number in range(environments)]
    return (psutil.Process().memory_info().rss - before) * len(kept) // environments


def steps_a_second(games: Sequence[Game], environments: int) -> float:
    """Steps of all environments of a vector environment together, admissible commands included, in one process."""
    env = TextVectorEnv(games, environments, step_limit=50)
    _, infos = env.reset(seed=0)
    rng, steps, spent = random.Random(0), 0, 0.0
    while spent < _SCALING_S:
        commands = [rng.choice(admissible) for admissible in infos["admissible_commands"]]
        started = time.perf_counter()
        *_, infos = env.step(commands)
        spent += time.perf_counter() - started
        steps += environments
    return steps / spent
