"""One KV cache for all precisions beside one each: the same games, by the same policies, with both."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dmr_pipeline.environments.base import Task
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.intervals import paired_interval
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import Streams, TokenStreams
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import RoutingPolicy, SinglePrecision
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.baselines import Confidence, Disagreement, RandomMixing, two_way_shares

SHARE = 0.35
"""Of the dearest precision, in random mixing."""
DOUBT = 0.5
"""Threshold of the confidence cascade."""
CONFIDENCE = 0.95

CacheMode = Literal["separate", "shared"]


class Played(FrozenModel):
    """A policy on all games."""

    policy: str
    cache: CacheMode
    success: float
    steps: float
    """Of an episode."""
    tokens: float
    """That forward passes read in an episode, of all precisions."""
    cost: float
    """Of an episode, in units of cost."""
    cache_bytes: int
    """Keys and values that were written, of all the episodes that were acted on at once."""
    seconds: float
    """Of a step of one episode, its environment included: on a CPU one thread's CPU time, else by the clock."""


class Compared(FrozenModel):
    """What one cache changes."""

    policy: str
    success: float
    """With one cache minus with several, on the same games."""
    low: float
    high: float
    """Ends of its interval."""
    tokens: float
    """With one cache, as a share of those with several; so the others."""
    cost: float
    cache_bytes: float
    seconds: float


class CacheRecord(FrozenModel):
    recipe: str
    split: str
    games: int
    at_once: int
    device: str
    confidence: float
    """Of the intervals."""
    played: list[Played]
    compared: list[Compared]


@dataclass(frozen=True)
class _Outcome:
    row: Played
    won: NDArray[np.bool_]
    """By game."""


def policies(rollouts: Rollouts, seed: int) -> dict[str, RoutingPolicy]:
    """Their state is per episode: each can play any number of times.

    Args:
        seed: of random mixing.
    """
    route = rollouts.route
    dear, cheap = route[0], route[-1]
    found: dict[str, RoutingPolicy] = {
        f"always_{dear}": SinglePrecision(dear, route),
        f"always_{cheap}": SinglePrecision(cheap, route),
        f"random at {SHARE}": RandomMixing(two_way_shares(route, SHARE), seed),
        f"confidence at {DOUBT}": Confidence(route, DOUBT),
        "disagreement": Disagreement(route),
    }
    if rollouts.can_draft:
        found[f"speculative:{dear}<{cheap}"] = SinglePrecision(dear, route, cheap)
    return found


def compare_caches(
    rollouts: Rollouts, games: Sequence[Task], at_once: int, seed: int, on_played: Callable[[Played], None]
) -> tuple[list[Played], list[Compared]]:
    """Each policy on these games, with a cache for each precision and with one for all. Nothing is looked up.

    Args:
        at_once: episodes.
        seed: of all that is drawn.

    Raises:
        UserError: the model's cache cannot be shared.
    """
    if rollouts.device.type == "cpu":
        torch.set_num_threads(1)
    both: dict[CacheMode, Rollouts] = {
        "separate": replace(rollouts, shared_cache=False),
        "shared": replace(rollouts, shared_cache=True),
    }
    rows, compared = [], []
    for name, policy in policies(rollouts, seed).items():
        found: dict[CacheMode, _Outcome] = {}
        for cache, its in both.items():
            found[cache] = _play(name, cache, policy, its, games, at_once, seed)
            on_played(found[cache].row)
        rows += [outcome.row for outcome in found.values()]
        compared.append(_compared(found["separate"], found["shared"]))
    return rows, compared


def _play(
    name: str,
    cache: CacheMode,
    policy: RoutingPolicy,
    rollouts: Rollouts,
    games: Sequence[Task],
    at_once: int,
    seed: int,
) -> _Outcome:
    clock = time.process_time if rollouts.device.type == "cpu" else time.perf_counter
    agents = rollouts.streams(at_once)
    started = clock()
    played = play(
        [RolloutRequest(game) for game in games],
        agents,
        rollouts.prompter,
        policy,
        rollouts.step_limit,
        rollouts.action,
        rollouts.temperature,
        seed,
        speculative=rollouts.speculative,
    )
    seconds = clock() - started
    won, steps = np.array([trajectory.success for trajectory in played]), sum(len(t.steps) for t in played)
    row = Played(
        policy=name,
        cache=cache,
        success=float(won.mean()),
        steps=steps / len(played),
        tokens=sum(trajectory.tokens_read for trajectory in played) / len(played),
        cost=sum(rollouts.cost(trajectory).total for trajectory in played) / len(played),
        cache_bytes=written_bytes(agents),
        seconds=seconds / steps,
    )
    return _Outcome(row, won)


def written_bytes(agents: Mapping[str, TokenStreams]) -> int:
    """Memory of the keys and values that were ever written: of positions that hold something else than the zeros of the start."""
    caches = (streams.storage for streams in agents.values() if isinstance(streams, Streams | PackedStreams))
    tensors = {tensor.data_ptr(): tensor for storage in caches for tensor in storage}
    count = 0
    for tensor in tensors.values():  # [..., slots, key-value heads, positions, head width]
        written = (tensor != 0).any(-1).any(-2)
        count += int(written.sum()) * tensor.shape[-3] * tensor.shape[-1] * tensor.itemsize
    return count


def _compared(separate: _Outcome, shared: _Outcome) -> Compared:
    several, one = separate.row, shared.row
    low, high = paired_interval(shared.won, separate.won, CONFIDENCE)
    return Compared(
        policy=one.policy,
        success=one.success - several.success,
        low=low,
        high=high,
        tokens=one.tokens / several.tokens,
        cost=one.cost / several.cost,
        cache_bytes=one.cache_bytes / several.cache_bytes,
        seconds=one.seconds / several.seconds,
    )
