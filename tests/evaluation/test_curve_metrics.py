"""Curves against the metrics of tables, which compute them from scores; gains in closed form."""

from collections.abc import Mapping

import numpy as np
import polars as pl
import pytest

from dmr_pipeline.evaluation.curve_metrics import curves_of
from dmr_pipeline.evaluation.curves import CURVES, RULE, SETTINGS, PlayedCurves, as_baselines, best_rules
from dmr_pipeline.evaluation.metrics import compute_metrics
from dmr_pipeline.evaluation.results import PolicyCurve
from dmr_pipeline.evaluation.routing_table import table_metrics
from dmr_pipeline.router.rules import rules
from tests.helpers.evaluations import make_episodes
from tests.helpers.rollouts import PROMPTER, ROUTE

GAMES = 40
COSTS = {"always_high": 1.0, "always_low": 0.2}
HOW = {"high": "always_high", "low": "always_low", "confidence": 0.9, "bootstrap": 200, "seed": 1}


def alone(high: np.ndarray, low: np.ndarray) -> pl.DataFrame:
    success = {"always_high": ("single", high[None]), "always_low": ("single", low[None])}
    return make_episodes(success, {"always_high": 1.0, "always_low": 0.0}, COSTS)


def curve(
    points: Mapping[float, tuple[np.ndarray, np.ndarray, np.ndarray]], name: str = "kl_router", kind: str = "router"
) -> pl.DataFrame:
    """Budget -> success, high-precision steps of ten, and cost of each game."""
    frames = []
    for budget, (success, high_steps, cost) in points.items():
        frame = make_episodes({name: (kind, success[None])}, {name: 0.5}, {name: 1.0}).with_columns(
            budget=pl.lit(budget),
            outgrown=pl.lit(False),
            high_steps=high_steps,
            spend=high_steps.astype(float),
            cost=cost,
        )
        frames.append(frame.select(CURVES.names()))
    return pl.concat(frames)


def settings_of(*names: str, budgets: tuple[float, ...]) -> pl.DataFrame:
    rows = [(name, budget, 0.5, 1.0, budget, 0.7, 0.5) for name in names for budget in budgets]
    return pl.DataFrame(rows, schema=SETTINGS, orient="row")


def test_a_curve_is_that_of_a_table_where_whole_games_are_routed_by_score() -> None:
    """A router that scores games and plays each at one precision: by thresholds it is a table's router, at every ratio."""
    generator = np.random.default_rng(3)
    high, low = (generator.random(GAMES) < 0.9).astype(float), (generator.random(GAMES) < 0.4).astype(float)
    scores = generator.random(GAMES) + 0.3 * (high - low)
    table = pl.DataFrame({"query": [f"game-{game:04d}" for game in range(GAMES)], "strong": high, "weak": low})
    table = table.with_columns(score=scores, strong_cost=pl.lit(1.0), weak_cost=pl.lit(0.2))
    expected = table_metrics(table, bootstrap=40)
    points = {}
    for routed in range(1, GAMES):
        strong = scores >= np.sort(scores)[-routed]
        points[routed / GAMES] = (np.where(strong, high, low), 10 * strong, np.where(strong, 1.0, 0.2))
    found = curves_of(curve(points), settings_of("kl_router", budgets=tuple(points)), alone(high, low), **HOW)
    (line,) = found.values()
    for metric, value in expected["router"].items():
        if metric != "qnc":
            assert line[metric] == pytest.approx(value, abs=1e-6), metric
    for point, ratio in zip(line["points"], points, strict=True):
        assert point["spend"] == pytest.approx(ratio, abs=1e-6)
    for metric in ("apgr", "aiq", "mean_gain"):
        low_end, high_end = line[f"{metric}_ci95"]
        assert low_end < line[metric] < high_end


def test_gains_are_over_the_line_of_single_precisions_and_paired_with_it() -> None:
    high, low = np.arange(GAMES) < 36, np.arange(GAMES) < 20
    half = np.arange(GAMES) < 32
    points = {
        0.2: (half, np.full(GAMES, 4), np.full(GAMES, 0.6)),
        0.4: (high, np.full(GAMES, 10), np.full(GAMES, 1.0)),
    }
    found = curves_of(curve(points), settings_of("kl_router", budgets=(0.2, 0.4)), alone(high, low), **HOW)
    first, second = found["kl_router"]["points"]
    assert first["gain_at_equal_cost"] == pytest.approx(0.8 - (0.5 + 0.9) / 2, abs=1e-6)
    assert first["gain_ci95"][0] < first["gain_at_equal_cost"] < first["gain_ci95"][1]
    # What plays as always-high does gains nothing, in no resample.
    assert (second["gain_at_equal_cost"], second["gain_ci95"]) == (0, [0, 0])
    assert found["kl_router"]["mean_gain"] == pytest.approx(first["gain_at_equal_cost"] / 2, abs=1e-6)


def test_without_a_gap_there_is_none_to_recover() -> None:
    same = np.arange(GAMES) < 20
    points = {0.3: (same, np.full(GAMES, 3), np.full(GAMES, 0.5))}
    line = curves_of(curve(points), settings_of("kl_router", budgets=(0.3,)), alone(same, same), **HOW)["kl_router"]
    assert (line["apgr"], line["apgr_ci95"], line["cpt50"]) == (None, None, None)


def test_a_router_s_rule_is_the_best_on_validation_that_costs_no_more_and_its_test_is_planned() -> None:
    high, low = np.arange(GAMES) < 36, np.arange(GAMES) < 20
    some = {0.2: (low, np.full(GAMES, 2), np.full(GAMES, 0.4)), 0.4: (high, np.full(GAMES, 4), np.full(GAMES, 0.7))}
    episodes = pl.concat([curve(some, "margin", RULE), curve(some, "first", RULE), curve(some)])
    rows = [
        # Of rules: cheap and poor, dear and best, within the cost and good, within the cost and as good but dearer.
        *(("margin", 0.2, 0.5, 1.0, 0.2, 0.6, 0.3), ("margin", 0.4, 0.5, 1.0, 0.4, 0.95, 0.9)),
        *(("first", 0.2, 0.5, 1.0, 0.2, 0.8, 0.49999999), ("first", 0.4, 0.5, 1.0, 0.4, 0.8, 0.55)),
        ("kl_router", 0.2, 0.5, 1.0, 0.2, 0.99, 0.1),
    ]
    played = PlayedCurves(episodes, pl.DataFrame(rows, schema=SETTINGS, orient="row"))
    games = [type("Game", (), {"task_id": f"game-{game}"}) for game in range(2)]
    validated = pl.DataFrame({"task_id": ["game-0", "game-1", "game-2"], "cost": [0.5, 0.7, 9.0]})
    cheap = pl.DataFrame({"task_id": ["game-0", "game-1"], "cost": [0.1, 0.1]})
    found = best_rules(played, {"kl_router": validated, "grpo_router": cheap}, games)
    assert found.keys() == {"kl_router"}
    best = found["kl_router"]
    assert (best["rule"], best["budget"], best["router_validation_cost"]) == ("first", 0.2, 0.6)
    assert best["validation_cost"] == 0.5, "rounded, so that float noise changes no hash"
    (named,) = as_baselines(played, found)
    assert set(named.select("policy", "kind", "variant_of").iter_rows()) == {
        ("rule@kl_router", "baseline", "kl_router")
    }
    routers = {"kl_router": ("router", high[None]), "grpo_router": ("router", high[None])}
    ratios, costs = dict.fromkeys(routers, 0.4), dict.fromkeys(routers, 0.6)
    policies = pl.concat([alone(high, low), make_episodes(routers, ratios, costs), named.drop("outgrown")])
    metrics = compute_metrics(
        policies, recipe="x", route=ROUTE, high="always_high", low="always_low", headline="grpo_router", bootstrap=50
    )
    planned = [(pair["policy"], pair["against"]) for pair in metrics["paired"] if pair["p_holm"] is not None]
    assert planned == [("grpo_router", "always_low"), ("kl_router", "rule@kl_router")]
    assert metrics["paired"][1]["difference"] == pytest.approx(0.4)


def test_recipes_name_the_rules_that_there_are() -> None:
    from typing import get_args

    from dmr_pipeline.recipe.evaluation import RuleName

    assert set(get_args(RuleName)) == set(rules(ROUTE, 50, PROMPTER, True, 0))
    assert PolicyCurve.__required_keys__ >= {"points", "apgr", "cpt50", "cpt80", "aiq", "mean_gain"}
