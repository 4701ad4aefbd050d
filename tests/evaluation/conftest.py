"""Made-up evaluations with known properties."""

from collections.abc import Callable, Mapping

import numpy as np
import polars as pl
import pytest

from dmr_pipeline.evaluation.metrics import EPISODES

Success = Mapping[str, tuple[str, np.ndarray]]
"""Policy -> kind and success, or reward, [draws, games]."""


def make_episodes(success: Success, ratios: Mapping[str, float], costs: Mapping[str, float]) -> pl.DataFrame:
    """Episodes of ten steps and a hundred tokens, with constant ratio and cost; game g is of type 'even' or 'odd'."""
    rows = [
        {
            "policy": policy,
            "kind": kind,
            "draw": draw,
            "game_id": f"game-{game:04d}",
            "task_type": ("even", "odd")[game % 2],
            "success": bool(solved == 1),
            "reward": float(solved),
            "steps": 10,
            "high_steps": round(10 * ratios[policy]),
            "tokens": 100,
            "high_tokens": round(100 * ratios[policy]),
            "switches": 2,
            "cost": costs[policy],
        }
        for policy, (kind, outcomes) in success.items()
        for draw, row in enumerate(outcomes)
        for game, solved in enumerate(row)
    ]
    return pl.DataFrame(rows, schema=EPISODES)


@pytest.fixture(scope="session")
def make() -> Callable[[Success, Mapping[str, float], Mapping[str, float]], pl.DataFrame]:
    return make_episodes


@pytest.fixture
def episodes() -> pl.DataFrame:
    """100 games: high solves 90, low 50, a router 85 at ratio 0.4 and cost 0.5, random about 70 in each of 3 draws."""
    ability = np.arange(100) / 100
    generator = np.random.default_rng(7)
    success: Success = {
        "always_high": ("single", ability[None] < 0.9),
        "always_low": ("single", ability[None] < 0.5),
        "random@kl_router": ("random", ability[None] + generator.normal(0, 0.1, (3, 100)) < 0.7),
        "kl_router": ("router", ability[None] < 0.85),
        "disagreement": ("oracle", ability[None] < 0.9),
    }
    ratios = {"always_high": 1.0, "always_low": 0.0, "random@kl_router": 0.4, "kl_router": 0.4, "disagreement": 0.2}
    costs = {"always_high": 1.0, "always_low": 0.2, "random@kl_router": 0.5, "kl_router": 0.5, "disagreement": 0.3}
    return make_episodes(success, ratios, costs)
