"""A study's results, of made-up episodes."""

import numpy as np
import polars as pl
import yaml

from dmr_pipeline.recipe import Recipe
from dmr_pipeline.study.design import Study
from dmr_pipeline.study.results import Place, Results, study_results
from tests.helpers.micro_recipe import RECIPE_YAML

GAMES = 200
ROUTE = ("float", "int2")
ENDS = (Place(1.0, 0.9), Place(0.2, 0.5))
"""On validation games."""
STUDY = Study.model_validate(
    {"recipe": "x", "routers": {"good": {}, "poor": {}}, "seeds": [0, 1], "budgets": [0.2, 0.4], "planned": [0.4]}
)
_CONTENT = yaml.safe_load(RECIPE_YAML)
_CONTENT["evaluation"]["bootstrap"], _CONTENT["precisions"]["margin"] = 400, 0.06
RECIPE = Recipe.model_validate({"name": "x", **_CONTENT})


def episodes(policy: str, kind: str, won: float, cost: float, ratio: float = 0.0, **more: object) -> pl.DataFrame:
    """The first games are won, so that all policies agree on which are hard."""
    validation = more.pop("validation", (None, None))
    rows = {
        "policy": policy,
        "kind": kind,
        "seed": more.get("seed"),
        "budget": more.get("budget"),
        "threshold": None if more.get("budget") is None else 0.25,
        "validation_cost": validation[0],
        "validation_success": validation[1],
        "cost": cost,
        "spend": 10 * ratio,
        "steps": 10,
    }
    table = pl.DataFrame({"task_id": [f"g{i:03}" for i in range(GAMES)], "success": np.arange(GAMES) < won * GAMES})
    kinds = {
        "seed": pl.Int64(),
        "budget": pl.Float64(),
        "threshold": pl.Float64(),
        "validation_cost": pl.Float64(),
        "validation_success": pl.Float64(),
    }
    return table.with_columns(pl.lit(value, kinds.get(name)).alias(name) for name, value in rows.items())


def made_up() -> Results:
    """Two routers of two seeds, two rules and an oracle."""
    frames = [
        episodes("always_float", "rung", 0.9, 1.0, 1.0),
        episodes("always_int2", "rung", 0.5, 0.2),
        episodes("always_int4", "rung", 0.6, 0.8),  # below the line between the two
        episodes("disagreement", "oracle", 0.9, 0.5, 0.3),
    ]
    for budget, cost in ((0.2, 0.4), (0.4, 0.6)):
        # On validation games the rule "fair" is the better one, on the fresh games "lucky" would have been.
        frames.append(episodes("rule:fair", "rule", 0.5 + budget, cost, budget, budget=budget, validation=(cost, 0.8)))
        frames.append(episodes("rule:lucky", "rule", 0.9, cost, budget, budget=budget, validation=(cost, 0.6)))
        frames.append(episodes("oracle-divergence", "oracle", 0.95, 0.5, budget, budget=budget, validation=(0.5, 0.95)))
        for seed in (0, 1):
            at = {"seed": seed, "budget": budget, "validation": (0.5, 0.9)}
            frames.append(episodes("good", "router", 0.8 + 0.1 * seed, 0.5, budget, **at))
            frames.append(episodes("poor", "router", 0.8, 0.4 + 0.2 * seed, budget, **at))
    return study_results(pl.concat(frames), STUDY, RECIPE, ROUTE, ENDS)
