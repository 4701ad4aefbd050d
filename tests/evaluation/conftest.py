"""Made-up evaluations with known properties."""

from collections.abc import Callable, Mapping

import numpy as np
import polars as pl
import pytest

from tests.helpers.evaluations import Ratio, Success, make_episodes


@pytest.fixture(scope="session")
def make() -> Callable[[Success, Mapping[str, Ratio], Mapping[str, float]], pl.DataFrame]:
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


@pytest.fixture
def of_three() -> pl.DataFrame:
    """100 games, three routed rungs: float solves 90, int4 alone 70 and int2 50; a router 85 with shares 0.3, 0.4 and 0.3."""
    ability = np.arange(100) / 100
    generator = np.random.default_rng(7)
    success: Success = {
        "always_high": ("single", ability[None] < 0.9),
        "always_low": ("single", ability[None] < 0.5),
        "always_int4": ("rung", ability[None] < 0.7),
        "random@kl_router": ("random", ability[None] + generator.normal(0, 0.1, (3, 100)) < 0.7),
        "kl_router": ("router", ability[None] < 0.85),
    }
    mixed = (0.3, 0.4, 0.3)
    shares = {"always_high": (1, 0, 0), "always_low": (0, 0, 1), "always_int4": (0, 1, 0)}
    shares |= dict.fromkeys(("random@kl_router", "kl_router"), mixed)
    costs = {"always_high": 1.0, "always_low": 0.2, "always_int4": 0.4, "random@kl_router": 0.5, "kl_router": 0.5}
    return make_episodes(success, shares, costs)
