"""Made-up evaluations with known properties."""

from collections.abc import Mapping

import numpy as np
import polars as pl

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
