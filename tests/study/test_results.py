"""Results of made-up episodes, against what they were made to show."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest

from dmr_pipeline.evaluation.statistics import smallest_difference
from dmr_pipeline.study.design import Study
from dmr_pipeline.study.results import Compared, Place, Results, sign_flip, study_results
from tests.helpers.studies import ENDS, GAMES, RECIPE, ROUTE, episodes, made_up


@pytest.fixture(scope="module")
def found() -> Results:
    return made_up()


def test_oracles_have_curves_and_nobody_is_compared_with_them(found: Results) -> None:
    assert "oracle-divergence" in {curve.policy for curve in found.curves}
    assert {one.router for one in found.compared} == {"good", "poor"}
    assert {one.rule for one in found.compared} == {"rule:fair"}


def test_points_and_what_they_gain_over_the_rungs(found: Results) -> None:
    points = {(point.policy, point.budget): point for point in found.points}
    good = points["good", 0.4]
    assert (good.success, good.by_seed, good.ratio, good.cost) == (0.85, [0.8, 0.9], 0.4, 0.5)
    assert good.seed_deviation == pytest.approx(np.std([0.8, 0.9], ddof=1), abs=1e-6)
    # A mixture of 5/8 int2 and 3/8 float costs 0.5 and wins .65: float's and int2's line, int4 is below it.
    assert good.gain == pytest.approx(0.85 - 0.65)
    low, high = good.gain_ci95
    assert low < good.gain < high
    # By game: 0.625 more in 30% of them, 0.125 in 10%, and else as much.
    deviation = np.sqrt(0.3 * 0.625**2 + 0.1 * 0.125**2 - 0.2**2)
    assert high - low == pytest.approx(2 * 1.96 * deviation / np.sqrt(GAMES), rel=0.15)
    assert points["always_float", None].gain == points["always_int2", None].gain == 0
    assert points["always_float", None].gain_ci95 == [0, 0]
    assert points["always_int4", None].gain == pytest.approx(0.6 - 0.8)
    assert points["rule:fair", 0.2].seed_deviation is None
    assert points["rule:fair", 0.2].thresholds == [0.25]
    assert points["good", 0.2].thresholds == [0.25, 0.25]
    assert points["always_float", None].thresholds == []


def test_rules_alone_have_points_and_nothing_to_compare() -> None:
    rule = episodes("rule:fair", "rule", 0.7, 0.4, 0.2, budget=0.2, validation=(0.4, 0.8))
    rungs = [episodes("always_float", "rung", 0.9, 1.0, 1.0), episodes("always_int2", "rung", 0.5, 0.2)]
    checks = episodes("speculative:float<int2", "speculative", 0.9, 0.4, 1.0)
    alone = Study.model_validate({"recipe": "x"})
    found = study_results(pl.concat([*rungs, checks, rule]), alone, RECIPE, ROUTE, ENDS)
    gains = {point.policy: point.gain for point in found.points}
    # Checking drafts wins what float does at .4: nothing that costs as much does better.
    assert gains["rule:fair"] == pytest.approx(0.7 - 0.9)
    assert (gains["speculative:float<int2"], gains["always_float"], found.compared) == (0, 0, [])
    assert [curve.policy for curve in found.curves] == ["rule:fair"]


def test_tuned_policies_beside_the_ends_of_the_route_and_the_oracle(found: Results) -> None:
    ends = {(one.policy, one.budget, one.against): one for one in found.references}
    tuned = {(point.policy, point.budget) for point in found.points if point.budget is not None}
    assert ends.keys() == {(*policy, against) for policy in tuned for against in (*ROUTE, "disagreement")}
    fair = ends["rule:fair", 0.4, "float"]  # wins 90% as float does, game for game, for .6 in place of 1
    assert (fair.difference, fair.difference_ci95, fair.p_value) == (0, [0, 0], 1)
    assert (fair.saved, *fair.saved_ci95) == pytest.approx((0.4, 0.4, 0.4))
    good = ends["good", 0.2, "int2"]  # seeds win 80% and 90%, int2 half, for .5 in place of .2
    assert good.difference == pytest.approx(0.35)
    low, high = good.difference_ci95
    assert low < 0.35 < high
    assert 0.28 < low < high < 0.42
    assert good.p_value < 0.001
    assert good.saved == pytest.approx(-1.5)
    left = ends["rule:fair", 0.2, "disagreement"]  # wins 70%, the oracle 90%, for .4 in place of .5
    assert (left.difference, left.saved) == (pytest.approx(-0.2), pytest.approx(0.2))
    differences = np.array([-1.0] * 40 + [0.0] * 160)
    assert left.smallest_difference == pytest.approx(smallest_difference(differences, 0.05), abs=1e-6)
    assert 0.08 < left.smallest_difference < 0.1


def test_curves(found: Results) -> None:
    curves = {curve.policy: curve for curve in found.curves}
    # Recovered: .75 at .2 and at .4, on from 0 and to 1.
    assert curves["poor"].apgr == pytest.approx(0.2 * 0.375 + 0.2 * 0.75 + 0.6 * 0.875)
    # The hull: from (.2, .5) up to (.5, .8) and on to (1, .9).
    assert curves["poor"].aiq == pytest.approx((0.3 * 0.65 + 0.5 * 0.85) / 0.8)
    assert list(curves) == ["rule:fair", "rule:lucky", "oracle-divergence", "good", "poor"]


def test_a_router_is_compared_with_the_rule_of_validation_games_at_its_own_cost(found: Results) -> None:
    good, poor = found.compared
    assert (good.router, poor.router, good.budget, good.rule, good.cost, good.rule_cost) == (
        "good", "poor", 0.4, "rule:fair", 0.5, 0.5,
    )  # fmt: skip
    # Half of the fair rule's games at .2, which wins 70%, and half at .4, which wins 90%.
    assert good.difference == pytest.approx(0.85 - 0.8)
    assert poor.difference == pytest.approx(0.8 - 0.8, abs=1e-9)
    assert good.difference_by_seed == pytest.approx([0.8 - 0.8, 0.9 - 0.8])
    assert poor.difference_by_seed == pytest.approx([0.8 - 0.7, 0.8 - 0.9])  # its trainings cost .4 and .6
    assert good.p_holm == pytest.approx(2 * good.p_value)
    assert poor.p_value == poor.p_holm
    assert (good.lost, poor.lost) == (pytest.approx(0.05), pytest.approx(0.1))
    assert not good.not_worse
    assert good.lost_ci95[0] < 0.05 < good.lost_ci95[1]


ONE = Study.model_validate({"recipe": "x", "routers": {"good": {}}, "seeds": [0], "budgets": [0.1], "planned": [0.1]})


def compared(*rules: tuple[float, float], router: tuple[float, float]) -> Compared:
    """A router against one rule at budgets with these costs and successes, between int2 (.2, .5) and float (1, .9)."""
    frames = [episodes("always_float", "rung", 0.9, 1.0, 1.0), episodes("always_int2", "rung", 0.5, 0.2)]
    for i, (cost, won) in enumerate(rules):
        frames.append(
            episodes("rule:one", "rule", won, cost, 0.2, budget=round(0.1 * (i + 1), 1), validation=(cost, won))
        )
    cost, won = router
    frames.append(episodes("good", "router", won, cost, 0.2, seed=0, budget=0.1, validation=(cost, won)))
    (one,) = study_results(pl.concat(frames), ONE, RECIPE, ROUTE, ENDS).compared
    return one


def test_a_router_that_is_dearer_than_the_rules_budgets_is_compared_with_the_rule_and_float_mixed() -> None:
    one = compared((0.4, 0.7), router=(0.6, 0.76))
    assert (one.cost, one.rule_cost) == (0.6, 0.6)
    # A third of the episodes at float: .7 + .2 / 3.
    assert one.difference == pytest.approx(0.76 - (0.7 + 0.2 / 3), abs=1e-6)


def test_a_rule_that_wins_more_for_less_is_taken_as_it_is() -> None:
    one = compared((0.4, 0.8), (0.5, 0.7), router=(0.4, 0.76))
    assert (one.rule_cost, one.difference) == (0.4, pytest.approx(-0.04))


def test_a_rule_that_cannot_cost_so_little_is_not_chosen() -> None:
    """Where float is cheaper than int2, whose episodes are long, a dear rule would be taken for float, which costs too much; and
    at what float costs all rules are float's equals."""
    frames = [episodes("always_float", "rung", 0.9, 1.0, 1.0), episodes("always_int2", "rung", 0.5, 1.2)]
    for name, cost, won in (("dear", 1.1, 0.6), ("cheap", 0.6, 0.8)):
        frames.append(episodes(f"rule:{name}", "rule", won, cost, 0.2, budget=0.1, validation=(cost, won)))
    ends = (Place(1.0, 0.9), Place(1.2, 0.5))
    for cost in (0.8, 1.1):
        router = episodes("good", "router", 0.85, 0.8, 0.2, seed=0, budget=0.1, validation=(cost, 0.85))
        (one,) = study_results(pl.concat([*frames, router]), ONE, RECIPE, ROUTE, ends).compared
        assert (one.rule, one.difference) == ("rule:cheap", pytest.approx(0.0, abs=1e-6))  # half of it at float


def test_the_mixtures_shares_are_as_uncertain_as_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two budgets close to one another in cost and far in success: which mixture costs what a router costs is then chance. Of
    simulated routers that are just that mixture few are told from it."""
    monkeypatch.setattr("dmr_pipeline.study.results.ROUNDS", 299)
    rng, found = np.random.default_rng(0), []
    for _ in range(40):
        hard = rng.random(GAMES)
        costs = {
            name: mean + rng.normal(0, 0.15, GAMES) for name, mean in (("low", 0.35), ("high", 0.4), ("own", 0.375))
        }
        frames = [episodes("always_float", "rung", 1.0, 1.0, 1.0), episodes("always_int2", "rung", 0.0, 0.01)]
        for name, budget, rate in (("low", 0.1, 0.83), ("high", 0.2, 0.93)):
            one = episodes("rule:one", "rule", rate, 0.0, 0.2, budget=budget, validation=(costs[name].mean(), rate))
            frames.append(one.with_columns(success=pl.Series(hard < rate), cost=pl.Series(costs[name])))
        mixed = np.where(rng.random(GAMES) < 0.5, hard < 0.83, hard < 0.93)
        router = episodes("good", "router", 0.88, 0.0, 0.2, seed=0, budget=0.1, validation=(0.375, 0.88))
        frames.append(router.with_columns(success=pl.Series(mixed), cost=pl.Series(costs["own"])))
        (one,) = study_results(pl.concat(frames), ONE, RECIPE, ROUTE, ENDS).compared
        found.append(one.p_value <= 0.05)
    assert np.mean(found) < 0.1


def test_one_game_shows_nothing() -> None:
    assert sign_flip(np.array([1.0]), 0) == 1.0


def test_sign_flips_of_single_games_are_the_binomial_test() -> None:
    differences = np.array([1.0] * 14 + [-1.0] * 4 + [0.0] * 60)
    assert sign_flip(differences, 0) == pytest.approx(binomtest(14, 18).pvalue, abs=0.01)
    assert sign_flip(np.zeros(5), 0) == 1.0
