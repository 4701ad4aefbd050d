"""How long a step takes, as the report says it."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.evaluation.policies import seconds_per_step
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.policy import SinglePrecision


@pytest.mark.parametrize(("a_step", "episodes"), [(0.1, 5), (10.0, 2), (100.0, 1)])
def test_a_slow_agent_is_timed_on_fewer_episodes(a_step: float, episodes: int) -> None:
    played = []

    def play(runs: Any, policy: Any, seed: int, clock: Timings) -> None:
        played.append(runs)
        clock.durations += [a_step, a_step]
        clock.router += a_step

    arena = cast(Any, SimpleNamespace(rollouts=SimpleNamespace(play=play), seed=0))
    found = seconds_per_step(SinglePrecision("float"), arena, [generate_game(0)[0]] * 5)
    assert len(played) == episodes
    assert found == {"mean": pytest.approx(a_step), "p95": pytest.approx(a_step), "router_share": pytest.approx(0.5)}
