"""Made-up evaluations with known properties."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from dmr_pipeline.evaluation.metrics import EPISODES

Success = Mapping[str, tuple[str, np.ndarray]]
"""Policy -> kind and success, or reward, [draws, games]."""


ROUTE, THREE = ("float", "int2"), ("float", "int4", "int2")
BITS = {"float": 32.0, "int4": 4.5, "int2": 2.5}
SPEND = {"float": 1.0, "int4": 0.25, "int2": 0.0}
Ratio = float | Sequence[float]
"""Share of the high-precision steps, of two rungs; or the shares of three, dearest first."""


def make_episodes(success: Success, ratios: Mapping[str, Ratio], costs: Mapping[str, float]) -> pl.DataFrame:
    """Episodes of ten steps and a hundred tokens, with constant shares and cost; game g is of type 'even' or 'odd'. Random
    policies are variants of the routers that their names tell."""

    def steps_at(policy: str) -> dict[str, int]:
        ratio = ratios[policy]
        shares = (ratio, 1 - ratio) if isinstance(ratio, float) else ratio
        return dict(zip(ROUTE if len(shares) == 2 else THREE, (round(10 * share) for share in shares), strict=True))

    rows = [
        {
            "policy": policy,
            "kind": kind,
            "variant_of": policy.removeprefix("random@") if kind == "random" else "",
            "draw": draw,
            "task_id": f"game-{game:04d}",
            "task_type": ("even", "odd")[game % 2],
            "success": bool(solved == 1),
            "reward": float(solved),
            "steps": 10,
            "high_steps": steps_at(policy)["float"],
            "tokens": 100,
            "high_tokens": 10 * steps_at(policy)["float"],
            "passes": 40,
            "drafted": 0,
            "accepted": 0,
            "steps_at": list(steps_at(policy).values()),
            "spend": sum(SPEND[rung] * steps for rung, steps in steps_at(policy).items()),
            "bits": sum(BITS[rung] * steps for rung, steps in steps_at(policy).items()),
            "switches": 2,
            "cost": costs[policy],
            "cost_cache": costs[policy] / 4,
            "unfinished": 0,
            "no_thought": 0,
            "empty": 0,
            "inadmissible": 1,
        }
        for policy, (kind, outcomes) in success.items()
        for draw, row in enumerate(outcomes)
        for game, solved in enumerate(row)
    ]
    return pl.DataFrame(rows, schema=EPISODES)


def with_checked(episodes: pl.DataFrame, name: str = "speculative:float<int2-mse") -> pl.DataFrame:
    """The episodes, and those of always-high once more, drafted and checked: 12 passes an episode, 36 of 40 tokens taken."""
    checked = episodes.filter(policy="always_high").with_columns(
        policy=pl.lit(name), kind=pl.lit("speculative"), variant_of=pl.lit("always_high"), cost=pl.lit(0.3),
        passes=pl.lit(12), drafted=pl.lit(40), accepted=pl.lit(36), cost_cache=pl.lit(0.1),
    )  # fmt: skip
    return pl.concat([episodes, checked.cast(EPISODES)])
