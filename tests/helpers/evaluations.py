"""Made-up evaluations with known properties."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl

from dmr_pipeline.evaluation.metrics import EPISODES
from dmr_pipeline.evaluation.results import BestRule, CurvePoint, Metrics, PolicyCurve

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


def with_curves(metrics: Metrics) -> Metrics:
    """The metrics, and curves of the router and of two rules at two budgets, one of which the router is compared with."""

    def curve(kind: Literal["router", "rule"], success: float) -> PolicyCurve:
        points: list[CurvePoint] = [
            {
                "budget": budget, "threshold": 0.5, "ties": 1.0, "validation_spend": budget, "validation_success": success,
                "validation_cost": 0.5, "success": success + budget / 10, "ci95": [success - 0.05, success + 0.1],
                "spend": budget - 0.01, "spend_ci95": [budget - 0.03, budget], "cost": 0.4 + budget,
                "cost_ci95": [0.35 + budget, 0.45 + budget], "gain_at_equal_cost": 0.05, "gain_ci95": [0.01, 0.09],
            }
            for budget in (0.2, 0.4)
        ]  # fmt: skip
        return {
            "kind": kind, "points": points, "apgr": 0.8, "apgr_ci95": [0.7, 0.9], "cpt50": 0.15, "cpt80": 0.35,
            "aiq": 0.75, "aiq_ci95": [0.7, 0.8], "mean_gain": 0.041, "mean_gain_ci95": [-0.012, 0.094],
        }  # fmt: skip

    best: BestRule = {
        "rule": "margin", "budget": 0.4, "validation_success": 0.8, "validation_cost": 0.5, "router_validation_cost": 0.55,
    }  # fmt: skip
    curves = {"kl_router": curve("router", 0.8), "margin": curve("rule", 0.78), "first": curve("rule", 0.6)}
    return {**metrics, "curves": curves, "best_rules": {"kl_router": best}}


def with_rule(episodes: pl.DataFrame) -> pl.DataFrame:
    """The episodes, and those of the rule that the router is compared with: as always-low at the router's cost."""
    rule = episodes.filter(policy="always_low").with_columns(
        policy=pl.lit("rule@kl_router"), kind=pl.lit("baseline"), variant_of=pl.lit("kl_router"), cost=pl.lit(0.5),
    )  # fmt: skip
    return pl.concat([episodes, rule.cast(EPISODES)])


def with_checked(episodes: pl.DataFrame, name: str = "speculative:float<int2-mse") -> pl.DataFrame:
    """The episodes, and those of always-high once more, drafted and checked: 12 passes an episode, 36 of 40 tokens taken."""
    checked = episodes.filter(policy="always_high").with_columns(
        policy=pl.lit(name), kind=pl.lit("speculative"), variant_of=pl.lit("always_high"), cost=pl.lit(0.3),
        passes=pl.lit(12), drafted=pl.lit(40), accepted=pl.lit(36), cost_cache=pl.lit(0.1),
    )  # fmt: skip
    return pl.concat([episodes, checked.cast(EPISODES)])
