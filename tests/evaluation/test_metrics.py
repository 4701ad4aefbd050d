import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.metrics import (
    average_gap_recovered,
    average_improvement_in_quality,
    call_performance_threshold,
    compute_metrics,
    game_weights,
    gap_recovered,
    success_interval,
)
from dmr_pipeline.evaluation.results import Metrics, failures_of
from dmr_pipeline.intervals import wilson
from tests.helpers.evaluations import ROUTE, THREE, with_checked


def compute(episodes: pl.DataFrame, **changes: object) -> Metrics:
    arguments: dict = {
        "recipe": "r",
        "route": ROUTE,
        "high": "always_high",
        "low": "always_low",
        "headline": "kl_router",
        "bootstrap": 500,
    }
    return compute_metrics(episodes, **(arguments | changes))


# Wilson's interval


def test_wilson_known_numbers() -> None:
    # 95%: 8 of 10 (textbook), and the closed form z^2 / (n + z^2) where nothing succeeds.
    assert wilson(0.8, 10, 0.95) == pytest.approx([0.4902, 0.9433], abs=5e-5)
    assert wilson(0.0, 100, 0.95) == pytest.approx([0.0, 1.959964**2 / (100 + 1.959964**2)], abs=1e-6)


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys_and_holds_the_estimate(n: int, share: float, confidence: float) -> None:
    successes = round(share * n)
    expected = stats.binomtest(successes, n).proportion_ci(confidence, "wilson")
    low, high = wilson(successes / n, n, confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1


# The bootstrap over games


def test_bootstrap_interval_is_scipys() -> None:
    success = np.random.default_rng(1).integers(0, 4, 150) / 3
    ours = success_interval(success, 3, game_weights(150, 20_000, 0), 0.9)
    theirs = stats.bootstrap(
        (success,), np.mean, confidence_level=0.9, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours == pytest.approx([theirs.low, theirs.high], abs=0.004)


def test_interval_covers_where_games_cluster() -> None:
    """Games differ in difficulty, three draws each: 95% intervals over games hold the mean about that often, while one
    over the 180 episodes as if they were independent would be too narrow."""
    generator = np.random.default_rng(0)
    weights = game_weights(60, 600, 0)
    covered = naive = 0
    for _ in range(400):
        difficulty = generator.choice([0.05, 0.95], 60)
        success = generator.binomial(3, difficulty) / 3
        low, high = success_interval(success, 3, weights, 0.95)
        covered += low <= 0.5 <= high
        low, high = wilson(float(success.mean()), 180, 0.95)
        naive += low <= 0.5 <= high
    assert 0.91 <= covered / 400 <= 0.98
    assert naive / 400 < 0.85


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_interval_without_variation_is_wilsons(rate: float) -> None:
    assert success_interval(np.full(50, rate), 3, game_weights(50, 100, 0), 0.95) == wilson(rate, 50, 0.95)


# Gap recovered


@given(arrays(np.bool_, (3, 40)))
def test_gap_recovered_algebra(outcomes: np.ndarray) -> None:
    """The ends recover 0 and 1, and mixing is linear."""
    success, high, low = outcomes.astype(float)
    weights = game_weights(40, 200, 0)
    value, interval = gap_recovered(success, high, low, weights, 0.95)
    if high.mean() <= low.mean():
        assert value is None
        assert interval is None
        return
    assert value is not None
    assert gap_recovered(high, high, low, weights, 0.95) == (1.0, pytest.approx([1.0, 1.0]))
    assert gap_recovered(low, high, low, weights, 0.95) == (0.0, pytest.approx([0.0, 0.0]))
    half, _ = gap_recovered((success + low) / 2, high, low, weights, 0.95)
    assert half == pytest.approx(value / 2)


def test_gap_interval_leaves_out_resamples_without_a_gap(make: Callable) -> None:
    high, low = np.zeros(12), np.zeros(12)
    high[:2], low[2] = 1, 1
    rows = {
        "always_high": ("single", high[None]),
        "always_low": ("single", low[None]),
        "kl_router": ("router", high[None]),
    }
    ratios = {"always_high": 1.0, "always_low": 0.0, "kl_router": 0.5}
    metrics = compute(make(rows, ratios, {"always_high": 1.0, "always_low": 0.1, "kl_router": 0.5}), bootstrap=4000)
    # The gap of a resample has the sign of Binomial(k, 2/3) - k/2 with k of 12 draws among the three games that differ.
    k = np.arange(13)
    no_gap = sum(
        stats.binom.pmf(n, 12, 0.25) * stats.binom.cdf(n // 2, n, 2 / 3) for n in k
    )  # at most half of the n for high
    assert metrics["gap"]["resamples_without_gap"] == pytest.approx(no_gap, abs=0.025)
    assert metrics["policies"]["kl_router"]["gap_ci95"] == [1.0, 1.0]


def test_no_gap_is_said_and_not_divided_by(episodes: pl.DataFrame) -> None:
    metrics = compute(episodes, high="always_low", low="always_high")
    assert metrics["policies"]["kl_router"]["gap_recovered"] is None
    assert metrics["policies"]["kl_router"]["gap_ci95"] is None
    assert metrics["apgr"] is None
    assert metrics["gap"]["difference"] == -0.4


# Curves


def test_routing_curve_closed_forms() -> None:
    assert average_gap_recovered([]) == 0.5
    assert call_performance_threshold([], 0.8) == pytest.approx(0.8)
    # Two triangles and a rectangle: 0.8 of the gap at a ratio of 0.4.
    assert average_gap_recovered([(0.4, 0.8)]) == pytest.approx(0.4 * 0.8 / 2 + 0.6 * 0.9)
    assert call_performance_threshold([(0.4, 0.8)], 0.5) == pytest.approx(0.25)
    assert call_performance_threshold([(0.4, 0.8)], 0.8) == pytest.approx(0.4)
    assert call_performance_threshold([(0.6, 0.2), (0.4, 0.8)], 0.8) == pytest.approx(0.4)


def test_quality_over_cost_closed_forms() -> None:
    ends = [(0.0, 0.5), (1.0, 0.9)]
    assert average_improvement_in_quality(ends, 0.0, 1.0) == pytest.approx(0.7)
    # A dominated point and one under the hull change nothing; the hull stays level past its best point.
    assert average_improvement_in_quality([*ends, (0.5, 0.4), (0.5, 0.6)], 0.0, 1.0) == pytest.approx(0.7)
    assert average_improvement_in_quality([*ends, (0.5, 0.9)], 0.0, 1.0) == pytest.approx(0.8)
    assert average_improvement_in_quality(ends, 0.0, 2.0) == pytest.approx((0.7 + 0.9) / 2)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_quality_over_cost_is_the_best_mixture(points: list[tuple[float, float]]) -> None:
    """At each cost the hull is the best that mixing two policies of at most that mean cost can do."""
    points = [(0.0, 0.0), *points]
    grid = np.linspace(0, 1, 401)
    best = np.zeros_like(grid)
    for (c1, s1), (c2, s2) in product(points, repeat=2):
        share = np.clip((grid - c1) / (c2 - c1), 0, 1) if c2 > c1 + 1e-9 else np.zeros_like(grid)
        best = np.maximum(best, np.where(grid >= c1, s1 + share * (s2 - s1), 0))
    assert average_improvement_in_quality(points, 0.0, 1.0) == pytest.approx(np.trapezoid(best, grid), abs=0.01)


# The gain at equal cost


def of_rungs(make: Callable, points: dict[str, tuple[float, int]], games: int = 20) -> pl.DataFrame:
    """Policies by (cost, games won of `games`); those that are called router are no single rungs."""
    kinds = {"always_high": "single", "always_low": "single"}
    rows = {
        name: ("router" if "router" in name else kinds.get(name, "rung"), np.arange(games)[None] < won)
        for name, (_, won) in points.items()
    }
    return make(rows, {name: float(name == "always_high") for name in points}, {n: c for n, (c, _) in points.items()})


@pytest.mark.parametrize(
    ("rung", "router", "gain", "below"),
    [
        # High (1.0, 90%), low (0.2, 50%), a rung between: corners at 0.2, 0.6 and 1.0.
        ((0.6, 16), (0.4, 14), 0.70 - 0.65, {}),
        ((0.6, 16), (0.8, 17), 0.0, {}),  # half of each: on the hull
        ((0.6, 14), (0.6, 14), 0.0, {}),  # the rung lies on the line from low to high
        ((0.6, 12), (0.6, 14), 0.0, {"always_int4": "mixture"}),  # 60% where the mixture of low and high has 70%
        ((0.6, 9), (0.6, 14), 0.0, {"always_int4": "always_low"}),
        ((0.6, 19), (0.8, 18), -0.05, {"always_high": "always_int4"}),  # level past the best rung
        ((0.1, 12), (0.05, 11), -0.05, {"always_low": "always_int4"}),  # below the cheapest: the cheapest's 60%
        ((0.1, 4), (0.15, 8), 0.40 - 0.35, {}),  # halfway from (0.1, 20%) to (0.2, 50%)
        ((0.2, 10), (0.2, 10), 0.0, {}),  # equal in both: neither dominates
        ((0.2, 12), (0.2, 10), -0.10, {"always_low": "always_int4"}),
    ],
)
def test_gain_over_the_hull_of_three_rungs_by_hand(
    make: Callable, rung: tuple[float, int], router: tuple[float, int], gain: float, below: dict[str, str]
) -> None:
    points = {"always_high": (1.0, 18), "always_low": (0.2, 10), "always_int4": rung, "kl_router": router}
    metrics = compute(of_rungs(make, points), bootstrap=50)
    policies = metrics["policies"]
    assert policies["kl_router"]["gain_at_equal_cost"] == pytest.approx(gain, abs=1e-6)
    assert metrics["below_hull"] == below
    on_it = sorted(
        (points[name][0], points[name][1] / 20, name) for name in points if "always" in name and name not in below
    )
    assert [(point["cost"], point["success"]) for point in metrics["hull"]] == [(cost, won) for cost, won, _ in on_it]
    for name in points.keys() - {"kl_router"}:
        assert (policies[name]["gain_at_equal_cost"] < 0) == (name in below)
        assert policies[name]["gain_ci95"][1] <= 0  # no single rung is above the hull in any resample


def test_the_hull_is_drawn_anew_in_each_resample(make: Callable) -> None:
    """Two rungs at one cost win other games, half each: the better of the two in a resample is what counts, so that the gain
    over the hull is the smaller of the gains over each."""
    wins = np.arange(40) % 2 == 0
    rows = {
        "always_high": ("single", wins[None]),
        "always_low": ("single", ~wins[None]),
        "kl_router": ("router", wins[None]),
    }
    ratios = {"always_high": 1.0, "always_low": 0.0, "kl_router": 0.5}
    router = compute(make(rows, ratios, dict.fromkeys(rows, 1.0)), bootstrap=4000)["policies"]["kl_router"]
    weights = game_weights(40, 4000, 0)
    gains = np.minimum(0, weights @ (wins * 1.0 - ~wins))
    assert router["gain_at_equal_cost"] == 0.0
    assert router["gain_ci95"] == pytest.approx(list(np.quantile(gains, [0.025, 0.975])), abs=1e-6)


POINT = st.tuples(st.integers(1, 40).map(lambda cost: cost / 20), st.integers(0, 20))


@settings(max_examples=40, deadline=None)
@given(rungs=st.lists(POINT, max_size=3), high=POINT, low=POINT, router=POINT, order=st.randoms(use_true_random=False))
def test_gain_is_over_every_mixture_that_costs_no_more(make: Callable, rungs, high, low, router, order) -> None:
    points = {"always_high": high, "always_low": low, "kl_router": router}
    points |= {f"always_{letter}": point for letter, point in zip("abc", rungs, strict=False)}
    metrics = compute(of_rungs(make, points), bootstrap=20)
    gain = metrics["policies"]["kl_router"]["gain_at_equal_cost"]
    cost, success = router[0], router[1] / 20
    single = [(c, won / 20) for c, won in (high, low, *rungs)]
    reached = [
        share * s1 + (1 - share) * s2
        for (c1, s1), (c2, s2) in product(single, repeat=2)
        for share in (*np.linspace(0, 1, 21), (cost - c2) / (c1 - c2) if c1 != c2 else 0.0)
        if 0 <= share <= 1 and share * c1 + (1 - share) * c2 <= cost + 1e-9
    ]
    if reached:
        assert gain == pytest.approx(success - max(reached), abs=1e-5)
        if low[0] <= cost and low[0] < high[0]:
            line = low[1] / 20 + min(1, (cost - low[0]) / (high[0] - low[0])) * (high[1] - low[1]) / 20
            assert gain <= success - line + 1e-5
    else:
        assert gain == pytest.approx(success - max(s for c, s in single if c == min(single)[0]), abs=1e-5)
    assert {point["policy"] for point in metrics["hull"]} | metrics["below_hull"].keys() == points.keys() - {
        "kl_router"
    }
    assert all(metrics["policies"][point["policy"]]["gain_at_equal_cost"] == 0 for point in metrics["hull"])
    names = list(points)
    order.shuffle(names)
    assert compute(of_rungs(make, {name: points[name] for name in names}), bootstrap=20) == metrics


# The whole


def test_metrics_of_known_episodes(episodes: pl.DataFrame) -> None:
    metrics = compute(episodes)
    router = metrics["policies"]["kl_router"]
    assert list(metrics["policies"]) == ["always_high", "always_low", "random@kl_router", "kl_router", "disagreement"]
    assert (router["kind"], router["success"], router["high_ratio"], router["cost"]) == ("router", 0.85, 0.4, 0.5)
    assert (router["n"], router["episodes"], router["steps"], router["switches"]) == (100, 100, 10.0, 2.0)
    assert router["ci95"] == pytest.approx(list(stats.binomtest(85, 100).proportion_ci(method="wilson")), abs=1e-6)
    assert router["gap_recovered"] == pytest.approx((0.85 - 0.5) / (0.9 - 0.5))
    assert router["cost_per_success"] == pytest.approx(0.5 / 0.85, abs=1e-6)
    # At cost 0.5 the line from (0.2, 50%) to (1, 90%) is at 65%.
    assert (router["cost_cache"], router["cost_ci95"], router["tokens"]) == (0.125, [0.5, 0.5], 100.0)
    assert router["gain_at_equal_cost"] == pytest.approx(0.2)
    assert router["by_task_type"]["even"]["n"] == 50
    assert "gap_recovered" not in metrics["policies"]["always_high"]
    assert metrics["policies"]["random@kl_router"]["episodes"] == 300
    assert router["token_high_ratio"] == 0.4
    assert metrics["gap"]["difference"] == pytest.approx(0.4)
    assert metrics["apgr"] == pytest.approx(0.4 * 0.875 / 2 + 0.6 * 1.875 / 2)
    assert metrics["cpt50"] == pytest.approx(0.4 * 0.5 / 0.875, abs=1e-6)
    # The hull goes through (0.2, 50%), (0.5, 85%), (1, 90%).
    assert metrics["aiq"] == pytest.approx((0.3 * 0.675 + 0.5 * 0.875) / 0.8)
    recovered = metrics["policies"]["random@kl_router"]["gap_recovered"]
    assert recovered is not None
    assert metrics["random_curve"]["apgr"] == pytest.approx(0.4 * recovered / 2 + 0.6 * (1 + recovered) / 2, abs=1e-6)


def test_failures_are_shares_of_the_steps(episodes: pl.DataFrame) -> None:
    first = pl.col("task_id") < "game-0010"
    router = episodes.filter(policy="kl_router").with_columns(
        unfinished=pl.when(first).then(3).otherwise(0), empty=pl.when(first).then(1).otherwise(0), inadmissible=2
    )
    others = episodes.filter(pl.col("policy") != "kl_router")
    metrics = compute(pl.concat([others, router.cast(others.schema)]))
    failed = metrics["policies"]["kl_router"]
    assert failed["failures"] == {"unfinished": 0.03, "no_thought": 0.0, "empty": 0.01, "inadmissible": 0.2}
    assert failed["parse_failures"] == 0.04
    assert metrics["policies"]["random@kl_router"]["failures"]["inadmissible"] == 0.1
    assert not [line for line in failures_of(metrics) if "parse failures" in line]
    failed["parse_failures"] = 0.5
    assert [line for line in failures_of(metrics) if line.startswith("kl_router: parse failures 0.5, failures {")]


def test_a_precision_that_only_checks_is_static_and_tells_its_passes(episodes: pl.DataFrame) -> None:
    metrics = compute(with_checked(episodes))
    assert list(metrics["policies"])[:3] == ["always_high", "always_low", "speculative:float<int2-mse"]
    found, high = metrics["policies"]["speculative:float<int2-mse"], metrics["policies"]["always_high"]
    assert (found["acting_passes"], found["accepted"]) == (1.2, 0.9)
    assert (high["acting_passes"], "accepted" in high) == (4.0, False)
    assert (found["success"], found["high_ratio"], found["gap_recovered"]) == (high["success"], 1.0, 1.0)
    # It wins what float does at .3, so that the router, at .5, wins 5 points less than a policy that decides nothing.
    assert (found["cost"], found["gain_at_equal_cost"]) == (0.3, 0.0)
    assert metrics["policies"]["kl_router"]["gain_at_equal_cost"] == pytest.approx(0.85 - 0.9, abs=1e-6)
    assert [point["policy"] for point in metrics["hull"]] == ["always_low", "speculative:float<int2-mse"]
    assert metrics["below_hull"] == {"always_high": "speculative:float<int2-mse"}
    planned = [pair["against"] for pair in metrics["paired"] if pair["p_holm"] is not None]
    assert planned == ["random@kl_router", "speculative:float<int2-mse"]


def test_a_rung_that_acts_alone_recovers_its_part_of_the_gap_and_is_no_router(episodes: pl.DataFrame) -> None:
    won = pl.col("task_id") < "game-0080"
    rung = episodes.filter(policy="always_low").with_columns(
        policy=pl.lit("always_int4"), kind=pl.lit("rung"), success=won, reward=won.cast(pl.Float64), cost=pl.lit(0.3)
    )
    before, metrics = compute(episodes), compute(pl.concat([episodes, rung]))
    assert list(metrics["policies"])[:3] == ["always_high", "always_low", "always_int4"]
    found = metrics["policies"].pop("always_int4")
    assert (found["success"], found["high_ratio"], found["gap_recovered"]) == (0.8, 0.0, 0.75)
    # (0.3, 80%) is a corner of the hull, so the router at 0.5 is measured against 80% + 0.2 / 0.7 * 10%.
    assert (found["gain_at_equal_cost"], found["gain_ci95"][1]) == (0.0, 0.0)
    assert metrics["policies"]["kl_router"]["gain_at_equal_cost"] == pytest.approx(0.05 - 0.02 / 0.7, abs=1e-6)
    assert [point["policy"] for point in metrics["hull"]] == ["always_low", "always_int4", "always_high"]
    assert [pair["against"] for pair in metrics["paired"]] == ["random@kl_router", "always_int4", "always_high"]
    for name, policy in before["policies"].items():
        changed = metrics["policies"][name]
        assert {**changed, "gain_at_equal_cost": 0, "gain_ci95": 0} == {
            **policy,
            "gain_at_equal_cost": 0,
            "gain_ci95": 0,
        }
    for of_routers in ("gap", "apgr", "cpt50", "cpt80", "aiq", "random_curve"):
        assert metrics[of_routers] == before[of_routers]  # type: ignore[literal-required]


def test_shares_spend_and_bits_of_two_rungs(episodes: pl.DataFrame) -> None:
    metrics = compute(episodes)
    assert metrics["route"] == ["float", "int2"]
    assert metrics["policies"]["kl_router"]["shares"] == {"float": 0.4, "int2": 0.6}
    assert metrics["policies"]["kl_router"]["mean_bits"] == pytest.approx(0.4 * 32 + 0.6 * 2.5)
    for policy in metrics["policies"].values():
        assert policy["spend"] == policy["high_ratio"] == policy["shares"]["float"]


def test_shares_spend_and_bits_of_three_rungs_by_hand(of_three: pl.DataFrame) -> None:
    """The means are over all steps together: of two episodes the longer one counts for more."""
    metrics = compute(of_three, route=THREE)
    assert metrics["route"] == list(THREE)
    found = {name: tuple(policy["shares"].items()) for name, policy in metrics["policies"].items()}
    assert found["kl_router"] == found["random@kl_router"] == (("float", 0.3), ("int4", 0.4), ("int2", 0.3))
    assert found["always_int4"] == (("float", 0.0), ("int4", 1.0), ("int2", 0.0))
    router = metrics["policies"]["kl_router"]
    assert router["high_ratio"] == router["token_high_ratio"] == 0.3
    assert router["spend"] == pytest.approx(0.3 * 1 + 0.4 * 0.25)
    assert router["mean_bits"] == pytest.approx(0.3 * 32 + 0.4 * 4.5 + 0.3 * 2.5)
    assert (metrics["policies"]["always_int4"]["spend"], metrics["policies"]["always_int4"]["mean_bits"]) == (0.25, 4.5)
    # The curve is over the spend: 0.875 of the gap at 0.4.
    assert metrics["apgr"] == pytest.approx(0.4 * 0.875 / 2 + 0.6 * 1.875 / 2)
    assert metrics["cpt50"] == pytest.approx(0.4 * 0.5 / 0.875, abs=1e-6)
    longer = pl.col("policy").eq("kl_router") & pl.col("task_id").eq("game-0000")
    changes = {"steps": 30, "steps_at": [30, 0, 0], "high_steps": 30, "spend": 30.0, "bits": 30 * 32.0}
    changed = of_three.with_columns(
        pl.when(longer).then(pl.lit(value, of_three.schema[name])).otherwise(name).alias(name)
        for name, value in changes.items()
    )
    router = compute(changed, route=THREE)["policies"]["kl_router"]
    assert router["shares"] == pytest.approx(
        {"float": (99 * 3 + 30) / 1020, "int4": 99 * 4 / 1020, "int2": 99 * 3 / 1020}, abs=1e-6
    )
    assert router["spend"] == pytest.approx((99 * 4 + 30) / 1020, abs=1e-6)
    assert router["mean_bits"] == pytest.approx((99 * 121.5 + 30 * 32) / 1020, abs=1e-6)


def test_a_rung_that_is_not_routed_has_no_share(episodes: pl.DataFrame) -> None:
    alone = episodes.filter(policy="always_low").with_columns(
        policy=pl.lit("always_int4"), kind=pl.lit("rung"), steps_at=pl.lit([], pl.List(pl.Int64)), bits=pl.lit(45.0)
    )
    found = compute(pl.concat([episodes, alone]))["policies"]["always_int4"]
    assert (found["shares"], found["spend"], found["mean_bits"]) == ({"float": 0.0, "int2": 0.0}, 0.0, 4.5)


def test_scores_of_known_rewards(make: Callable) -> None:
    """Even games give the router 0.25, odd ones 0.75: the bootstrap's mean is 0.25 + Binomial(100, 1/2) / 200."""
    rewards = np.tile([0.25, 0.75], 50)
    draws = np.array([rewards, 1 - rewards, np.ones(100)])
    rows = {
        "always_high": ("single", np.ones((1, 100))),
        "always_low": ("single", np.full((1, 100), 0.5)),
        "kl_router": ("router", rewards[None]),
        "random@kl_router": ("random", draws),
    }
    ratios = {"always_high": 1.0, "always_low": 0.0, "random@kl_router": 0.4, "kl_router": 0.4}
    metrics = compute(make(rows, ratios, dict.fromkeys(ratios, 1.0)), bootstrap=4000)
    policies = metrics["policies"]
    assert {name: policy["score"] for name, policy in policies.items()} == pytest.approx(
        {"always_high": 1.0, "always_low": 0.5, "random@kl_router": 2 / 3, "kl_router": 0.5}, abs=1e-6
    )
    ends = stats.binom.ppf([0.025, 0.975], 100, 0.5)
    assert policies["kl_router"]["score_ci95"] == pytest.approx(0.25 + ends / 200, abs=0.003)
    # Rewards that do not vary over the games would leave the bootstrap without a width.
    assert policies["always_low"]["score_ci95"] == pytest.approx(wilson(0.5, 100, 0.95), abs=1e-6)
    assert policies["always_high"]["score_ci95"] == policies["always_high"]["ci95"]
    by_type = policies["kl_router"]["by_task_type"]
    assert {name: part["score"] for name, part in by_type.items()} == {"even": 0.25, "odd": 0.75}
    assert policies["kl_router"]["success"] == 0.0  # only a reward of 1 is one
    assert not [line for line in failures_of(metrics) if "score" in line]
    policies["kl_router"]["score"] = -0.1
    assert "kl_router: score -0.1 with success 0.0" in failures_of(metrics)


def test_rewards_of_0_and_1_have_no_score(episodes: pl.DataFrame) -> None:
    assert "score" not in json.dumps(compute(episodes))


def test_confidence_and_seed_reach_the_intervals(episodes: pl.DataFrame) -> None:
    def intervals(metrics: Metrics) -> dict[str, tuple[float, float]]:
        random, router = metrics["policies"]["random@kl_router"], metrics["policies"]["kl_router"]
        found = {
            "bootstrap": random["ci95"],
            "wilson": router["ci95"],
            "gap": router["gap_ci95"],
            "paired": metrics["paired"][0]["ci95"],
        }
        return {name: (interval[0], interval[1]) for name, interval in found.items() if interval}

    wide, narrow, reseeded = (intervals(compute(episodes, **c)) for c in ({}, {"confidence": 0.5}, {"seed": 1}))
    assert len(wide) == 4
    for name, (low, high) in wide.items():
        assert low < narrow[name][0] < narrow[name][1] < high
    assert reseeded["wilson"] == wide["wilson"]
    assert reseeded["bootstrap"] != wide["bootstrap"]


def test_paired_rows(episodes: pl.DataFrame) -> None:
    random, low, high = compute(episodes)["paired"]
    assert (low["against"], low["difference"]) == ("always_low", 0.35)  # the only precision alone that costs no more
    success = {
        policy: episodes.filter(policy=policy).group_by("task_id").agg(pl.mean("success")).sort("task_id")["success"]
        for policy in ("kl_router", "random@kl_router")
    }
    difference = (success["kl_router"] - success["random@kl_router"]).to_numpy()
    assert (random["policy"], random["against"]) == ("kl_router", "random@kl_router")
    assert random["difference"] == pytest.approx(difference.mean(), abs=1e-6)
    assert (random["wins"], random["losses"]) == ((difference > 1e-9).sum(), (difference < -1e-9).sum())
    assert random["wins"] + random["losses"] + random["ties"] == 100
    assert random["p_value"] < 0.001
    assert random["ci95"][0] > 0
    # High solves five games more and no other: McNemar's 2 / 2^5.
    assert (high["against"], high["losses"], high["p_value"]) == ("always_high", 5, 0.0625)
    assert high["cost_difference"] == -0.5


def test_planned_comparisons_are_corrected_and_no_others(episodes: pl.DataFrame) -> None:
    """Random at the headline's ratio, the confidence cascade, the best single rung that costs no more."""
    cascade = episodes.filter(policy="disagreement").with_columns(policy=pl.lit("confidence"), kind=pl.lit("baseline"))
    metrics = compute(pl.concat([episodes, cascade]))
    planned = {row["against"]: row for row in metrics["paired"] if row["p_holm"] is not None}
    assert list(planned) == [row["against"] for row in metrics["paired"][:3]]
    assert list(planned) == ["random@kl_router", "confidence", "always_low"]
    raw = sorted(row["p_value"] for row in planned.values())
    assert planned["confidence"]["p_value"] == raw[-1] == planned["confidence"]["p_holm"]
    assert min(row["p_holm"] for row in planned.values()) == pytest.approx(min(1.0, 3 * raw[0]), abs=3e-6)


def test_no_worse_than_high_by_a_margin(episodes: pl.DataFrame) -> None:
    """Five of 100 games lost and none gained: Wilson's interval of the losses."""
    test = compute(episodes)["non_inferiority"]
    assert test == {
        "margin": 0.05,
        "lower": pytest.approx(-stats.binomtest(5, 100).proportion_ci(0.95, "wilson").high, abs=1e-6),
        "games_needed": 73,
        "shown": False,
    }
    assert compute(episodes, margin=0.12)["non_inferiority"]["shown"]
    few = episodes.filter(pl.col("task_id") < "game-0050")  # which the router wins all
    test = compute(few)["non_inferiority"]
    assert test["lower"] == pytest.approx(-stats.binomtest(0, 50).proportion_ci(0.95, "wilson").high, abs=1e-6)
    assert not test["shown"]
    assert compute(few, margin=0.08)["non_inferiority"]["shown"]


def test_headline_comes_first_and_routers_are_compared(episodes: pl.DataFrame) -> None:
    def renamed(rows: pl.DataFrame) -> pl.DataFrame:
        return rows.with_columns(pl.col("policy", "variant_of").str.replace("kl_router", "a_router"))

    both = pl.concat([episodes, renamed(episodes.filter(pl.col("policy").str.contains("kl_router")))])
    pairs = [(row["policy"], row["against"]) for row in compute(both)["paired"]]
    assert pairs == [
        ("kl_router", "random@kl_router"),
        ("kl_router", "always_low"),
        ("kl_router", "always_high"),
        ("a_router", "random@a_router"),
        ("a_router", "always_low"),
        ("a_router", "always_high"),
        ("kl_router", "a_router"),
    ]


def test_a_router_is_compared_with_itself_with_searches_switched(episodes: pl.DataFrame) -> None:
    switched = episodes.filter(policy="kl_router").with_columns(
        policy=pl.lit("kl_router-search"),
        kind=pl.lit("ablation"),
        variant_of=pl.lit("kl_router"),
        success=pl.lit(False),
        reward=pl.lit(0.0),
    )
    without, metrics = compute(episodes), compute(pl.concat([episodes, switched]))
    pairs = {(row["policy"], row["against"]): row for row in metrics["paired"]}
    assert list(pairs)[3:] == [("kl_router", "kl_router-search")]
    assert pairs["kl_router", "kl_router-search"]["difference"] == 0.85
    assert metrics["policies"]["kl_router-search"]["gap_recovered"] == pytest.approx(-0.5 / 0.4)
    for curve in ("apgr", "cpt50", "aiq"):  # it is no point of the routers' curve
        assert metrics[curve] == without[curve]


@settings(max_examples=25, deadline=None)
@given(success=arrays(np.bool_, (6, 24)), seed=st.integers(0, 2**32 - 1))
def test_any_episodes(make: Callable, success: np.ndarray, seed: int) -> None:
    """Rates lie in [0, 1], success intervals hold their estimate, and the bytes don't depend on the order of rows."""
    rows = {
        "always_high": ("single", success[:1]),
        "always_low": ("single", success[1:2]),
        "kl_router": ("router", success[2:3]),
        "random@kl_router": ("random", success[3:]),
    }
    ratios = {"always_high": 1.0, "always_low": 0.0, "random@kl_router": 0.3, "kl_router": 0.3}
    costs = {"always_high": 1.0, "always_low": 0.2, "random@kl_router": 0.5, "kl_router": 0.5}
    episodes = make(rows, ratios, costs)
    metrics = compute(episodes)
    for policy in metrics["policies"].values():
        assert 0 <= policy["ci95"][0] <= policy["success"] <= policy["ci95"][1] <= 1
        assert 0 <= policy["high_ratio"] <= 1
        assert 0 <= policy["token_high_ratio"] <= 1
        by_type = policy["by_task_type"].values()
        assert sum(part["n"] * part["success"] for part in by_type) == pytest.approx(24 * policy["success"], abs=1e-3)
    assert all(0 <= pair["p_value"] <= 1 for pair in metrics["paired"])
    shuffled = episodes.sample(fraction=1, shuffle=True, seed=seed)
    assert json.dumps(compute(shuffled), allow_nan=False) == json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: rows.drop("cost"), "missing columns: cost"),
        (lambda rows: rows.filter(pl.col("policy") != "always_low"), "no policy 'always_low'"),
        (lambda rows: rows.head(-1), "'random@kl_router' lacks episodes"),
        (lambda rows: pl.concat([rows, rows.head(1)]), "appears twice"),
        (lambda rows: rows.with_columns(kind=pl.lit("magic")), "unknown kind magic"),
        (lambda rows: rows.with_columns(high_steps=pl.lit(11, pl.Int64)), "impossible steps"),
        (lambda rows: rows.with_columns(steps_at=pl.lit([6, 5], pl.List(pl.Int64))), "impossible steps"),
        (lambda rows: rows.with_columns(spend=pl.lit(10.5)), "impossible steps"),
        (lambda rows: rows.with_columns(bits=pl.lit(0.0)), "impossible steps"),
        (lambda rows: rows.with_columns(accepted=pl.lit(1)), "impossible steps"),
        (lambda rows: rows.with_columns(passes=pl.lit(0)), "impossible steps"),
        (lambda rows: rows.with_columns(unfinished=pl.lit(10)), "impossible steps"),
        (lambda rows: rows.drop("variant_of"), "missing columns: variant_of"),
        (lambda rows: rows.with_columns(cost_cache=pl.col("cost") + 0.1), "impossible steps, tokens, cost or reward"),
        (lambda rows: rows.with_columns(cost_cache=pl.lit(-0.1)), "impossible steps, tokens, cost or reward"),
        (lambda rows: rows.with_columns(cost=pl.lit(float("nan"))), "impossible steps, tokens, cost or reward"),
        (lambda rows: rows.with_columns(reward=pl.lit(0.5)), "impossible steps, tokens, cost or reward"),
        (lambda rows: rows.with_columns(success=pl.lit(None, pl.Boolean)), "missing values in success"),
    ],
)
def test_bad_episodes_get_one_clear_line(
    episodes: pl.DataFrame, damage: Callable[[pl.DataFrame], pl.DataFrame], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        compute(damage(episodes.sort("policy")))
    assert "\n" not in str(caught.value)


def test_metrics_do_not_import_matplotlib() -> None:
    code = "import sys, dmr_pipeline.evaluation.metrics; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
