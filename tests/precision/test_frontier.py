"""The front of single precisions, and the verdict whether routing can pay."""

import math
from itertools import product
from math import comb

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binom, binomtest

from dmr_pipeline.intervals import paired_interval
from dmr_pipeline.precision.frontier import (
    PLAYED,
    beaten_by,
    checked_facts,
    clearly_beaten,
    drafters,
    ladder_facts,
    rungs_played,
    to_deploy,
)
from dmr_pipeline.precision.ladder import Checked, LadderFacts, RungFacts, deployed
from dmr_pipeline.recipe.precisions import Precisions, Rung

GAMES = 100
BITS = {"float": 16, "int8": 8, "int4": 4, "int2": 2}


def judged(
    rungs: dict[str, tuple[int, float]],
    route: object = "auto",
    games: int = GAMES,
    checks: dict[str, float] | None = None,
    **fields: object,
) -> LadderFacts:
    """A ladder whose rungs win so many of the games, the last ones, at such a mean cost.

    Args:
        checks: drafter -> what it costs the rung to deploy to check its drafts.
    """
    precisions = Precisions(
        ladder=tuple(Rung(name=name, weights=name) for name in rungs),
        route=route,
        **fields,  # type: ignore[arg-type]
    )
    facts = [
        RungFacts(
            name=name, bytes=BITS[name], pass_bytes=BITS[name], bits_per_weight=BITS[name], quantized_share=0,
            kl_to_float=0, greedy_disagreement=0, reloads_equal=True,
        )
        for name in rungs
    ]  # fmt: skip
    rows = [
        (name, f"{game:03}", game >= games - won, 1, 0, cost, 0.25 * cost)
        for name, (won, cost) in rungs.items()
        for game in range(games)
    ]
    table = pl.DataFrame(rows, schema=PLAYED, orient="row")
    played = rungs_played(facts, table, precisions)
    success = to_deploy(played, precisions).validation_success
    checked = [
        Checked(drafter=name, validation_success=success, cost=cost, cost_cache=0.0, passes=1.2, accepted=0.9)
        for name, cost in (checks or {}).items()
    ]
    assert {one.drafter for one in checked} <= set(drafters(played, to_deploy(played, precisions)))
    return ladder_facts(played, checked, table, 1000.0, precisions)


def test_routing_can_pay_between_the_cheapest_that_is_as_good_and_what_is_cheaper_and_worse() -> None:
    found = judged({"float": (91, 1.0), "int8": (91, 0.5), "int4": (92, 0.25), "int2": (60, 0.2)})
    assert {rung.name: rung.dominated_by for rung in found.rungs} == {
        "float": "int4", "int8": "int4", "int4": "", "int2": "",
    }  # fmt: skip
    verdict = found.verdict
    assert (verdict.pays, verdict.route, verdict.deploy) == (True, ("int4", "int2"), "int4")
    assert found.route == ("int4", "int2")
    assert verdict.text.startswith(
        "Routing can pay between int4 (92.0% at a cost of 0.250) and int2 (60.0% at a cost of 0.200): at most 20% of the cost of"
        " int4 at its success, or 32.0 points of success at the cost of int2 (95% interval "
    )


def test_clearly_beaten_are_rungs_that_cost_no_less_than_one_that_surely_wins_more() -> None:
    """Of 100 games: 60 and 80 wins have intervals apart, 60 and 70 do not; a cheaper rung is never beaten."""
    found = judged({"float": (80, 1.0), "int8": (90, 0.5), "int4": (60, 0.5), "int2": (10, 0.4)})
    assert clearly_beaten(found.rungs) == {"int4": "int8"}
    found = judged({"float": (70, 0.5), "int4": (60, 1.0)})
    assert clearly_beaten(found.rungs) == {}


def test_a_rung_that_stopped_is_told_of_its_own_games_and_is_beaten_whatever_the_others_did_later() -> None:
    """int8 wins the later games alone; on the first 20 float has won all, and int2 a quarter at a higher cost."""
    rows = [("float", f"{g:03}", g < 40, 1, 0, 1.0, 0.2) for g in range(100)]
    rows += [("int8", f"{g:03}", g >= 30, 1, 0, 0.6, 0.1) for g in range(100)]
    rows += [("int2", f"{g:03}", g % 4 == 0, 4, g % 2, 1.5, 0.3) for g in range(20)]
    table = pl.DataFrame(rows, schema=PLAYED, orient="row")
    precisions = Precisions(ladder=tuple(Rung(name=n, weights=n) for n in ("float", "int8", "int2")), route="auto")
    facts = [
        RungFacts(name=n, bytes=BITS[n], pass_bytes=BITS[n], bits_per_weight=BITS[n], quantized_share=0, kl_to_float=0,
                  greedy_disagreement=0, reloads_equal=True)
        for n in ("float", "int8", "int2")
    ]  # fmt: skip
    by_float, int8, int2 = rungs_played(facts, table, precisions)
    assert (by_float.games, int8.games, int2.games) == (None, None, 20)
    assert (int2.validation_success, int2.cost, int2.lost) == (0.25, 1.5, 0.75)
    assert int2.dominated_by == "float"
    assert (by_float.parse_failures, int2.parse_failures) == (0, 10 / 80)
    assert (by_float.dominated_by, by_float.validation_success) == ("int8", 0.4)
    assert clearly_beaten([by_float, int8, int2])["int2"] == "float"
    assert "games" not in by_float.model_dump()
    mine, others = table.filter(rung="int2"), {"float": table.filter(rung="float"), "int8": table.filter(rung="int8")}
    assert beaten_by(mine, others, 0.95) == "float"
    assert beaten_by(mine, {"int8": others["int8"]}, 0.95) is None  # it won none of these
    dearer = {"float": others["float"].with_columns(cost=pl.lit(1.6))}
    assert beaten_by(mine, dearer, 0.95) is None  # who costs more has beaten nobody
    assert beaten_by(mine.head(4), others, 0.95) is None  # too few games to tell


def test_a_dear_rung_on_the_front_is_not_routed_where_a_cheaper_one_is_not_worse() -> None:
    """float wins a game more, which two hundred games cannot show."""
    found = judged({"float": (182, 1.0), "int4": (181, 0.25), "int2": (120, 0.2)}, games=200)
    assert found.rungs[0].dominated_by == ""
    assert found.verdict.route == ("int4", "int2")
    strict = judged({"float": (91, 1.0), "int4": (90, 0.25), "int2": (60, 0.2)}, margin=0.0)
    assert strict.verdict.route == ("float", "int4", "int2")


def test_where_the_best_is_the_cheapest_nothing_is_gained() -> None:
    found = judged({"float": (182, 1.0), "int4": (181, 0.25), "int2": (181, 0.2)}, pair=("float", "int4"), games=200)
    assert (found.verdict.pays, found.verdict.deploy, found.route) == (False, "int2", ("float", "int4"))
    assert found.verdict.text == (
        "Routing cannot pay: int2 (90.5% at a cost of 0.200) is at most 5 points worse than float (91.0% at a cost of 1.000), and"
        " no smaller rung on the front costs 5% less. Deploy int2."
    )
    assert judged({"float": (91, 1.0), "int2": (91, 0.2)}).route == ("float", "int2"), (
        "the ends of the ladder by default"
    )


def test_an_agent_that_does_not_know_the_task_has_no_rung_to_deploy() -> None:
    """That a rung is at most 5 points worse says nothing where there are not 5 points to lose."""
    found = judged({"float": (4, 1.0), "int4": (4, 0.4)}, games=200)
    assert found.verdict.text == (
        "Routing cannot pay: of float (2.0% at a cost of 1.000) and int4 (2.0% at a cost of 0.400) none knows the task, so there"
        " is nothing to lose by a cheap one, and none to deploy. Let the agent learn first (agent.finetune), or see whether it"
        " writes what its prompt asks for."
    )
    assert not judged({"float": (10, 1.0), "int4": (0, 0.4)}, games=200).verdict.pays
    assert "Deploy" in judged({"float": (12, 1.0), "int4": (12, 0.4)}, games=200).verdict.text


def test_low_bits_that_fail_for_so_long_that_they_cost_more_are_no_choice() -> None:
    found = judged({"float": (91, 1.0), "int2": (10, 1.2)})
    assert (found.verdict.pays, found.verdict.deploy) == (False, "float")
    standing = (
        "(91.0% at a cost of 1.000) is the best there is, and no smaller rung on the front costs 5% less. Deploy float."
    )
    assert found.verdict.text.endswith(standing)


def test_what_checking_saves_is_not_there_for_routers_to_save() -> None:
    rungs = {"float": (91, 1.0), "int4": (92, 0.5), "int2": (60, 0.3)}
    dear = judged(rungs, checks={"int2": 0.6}).verdict
    assert (dear.drafter, dear.text) == ("", judged(rungs).verdict.text), "it costs more than writing"
    found = judged(rungs, checks={"int2": 0.4}).verdict
    assert (found.pays, found.route, found.deploy, found.drafter) == (True, ("int4", "int2"), "int4", "int2")
    assert "at most 25% of the cost of int4, 0.400 where it checks int2's drafts, at its success" in found.text
    none = judged(rungs, checks={"int2": 0.31}).verdict
    assert (none.pays, none.route, none.drafter, deployed(none)) == (False, ("int4",), "int2", ["int4", "int2"])
    assert none.text.endswith(
        "no smaller rung on the front costs 5% less than its checking int2's drafts (0.310). Deploy int4, checking int2's drafts."
    )


def test_the_cheapest_drafter_is_deployed_though_it_is_no_agent() -> None:
    rungs = {"float": (91, 1.0), "int8": (91, 0.5), "int4": (85, 0.4), "int2": (2, 0.9)}
    verdict = judged(rungs, checks={"int4": 0.44, "int2": 0.43}).verdict
    assert (verdict.deploy, verdict.drafter, verdict.route) == ("int8", "int2", ("int8", "int4"))


def test_what_was_checked_is_told_of_all_its_games() -> None:
    columns = {"success": [True, False], "steps": [2, 8], "passes": [3, 9], "drafted": [10, 30], "accepted": [10, 10]}
    found = checked_facts("int2", pl.DataFrame(columns | {"cost": [0.2, 0.4], "cost_cache": [0.0, 0.1]}))
    assert (found.validation_success, found.cost, found.cost_cache) == (0.5, pytest.approx(0.3), 0.05)
    assert (found.passes, found.accepted) == (1.2, 0.5)


def test_what_saves_next_to_nothing_is_not_routed_to() -> None:
    rungs = {"float": (91, 1.0), "int4": (92, 0.5), "int2": (60, 0.49)}
    assert (judged(rungs).verdict.pays, judged(rungs).verdict.deploy) == (False, "int4")
    assert judged(rungs, least_saving=0.01).verdict.route == ("int4", "int2")


def test_a_named_route_stays_whatever_the_verdict_says() -> None:
    rungs = {"float": (182, 1.0), "int4": (181, 0.25), "int2": (120, 0.2)}
    found = judged(rungs, route=("float", "int2"), games=200)
    assert (found.verdict.route, found.route) == (("int4", "int2"), ("float", "int2"))


def test_few_games_do_not_show_that_a_rung_is_as_good() -> None:
    """At equal success the interval of ten games is wider than the margin, that of a thousand is not."""
    rungs = {"float": (9, 1.0), "int4": (8, 0.3), "int2": (2, 0.2)}
    assert judged(rungs, games=10).verdict.route[0] == "float"
    many = {name: (100 * won, cost) for name, (won, cost) in rungs.items()} | {"int4": (895, 0.3)}
    assert judged(many, games=1000).verdict.route[0] == "int4"


@pytest.mark.parametrize(("both", "first", "second", "neither"), [(40, 10, 3, 7), (50, 0, 0, 10), (0, 20, 0, 0)])
def test_the_ends_of_the_paired_interval_are_what_the_score_test_just_rejects(
    both: int, first: int, second: int, neither: int
) -> None:
    """With the restricted likelihood maximised by a search."""
    cells = both * [(True, True)] + first * [(True, False)] + second * [(False, True)] + neither * [(False, False)]
    a, b = np.array(cells).T
    n, found = len(cells), paired_interval(a, b, 0.95)
    for end in found:
        if abs(end) == 1:
            continue

        def unlikely(lost: float, end: float = end) -> float:
            return -float(xlogy([first, second, n - first - second], [lost + end, lost, 1 - 2 * lost - end]).sum())

        least, most = max(0.0, -end), (1 - end) / 2
        lost = minimize_scalar(unlikely, bounds=(least, most), method="bounded", options={"xatol": 1e-12}).x
        deviation = math.sqrt((2 * lost + end * (1 - end)) / n)
        assert abs((first - second) / n - end) / deviation == pytest.approx(1.959964, abs=1e-3)
    low, high = paired_interval(b, a, 0.95)
    assert (-high, -low) == pytest.approx(found, abs=1e-6)


@given(st.integers(1, 300).flatmap(lambda games: st.tuples(st.integers(0, games), st.just(games))))
def test_where_only_one_of_the_two_wins_games_alone_the_paired_interval_ends_where_wilsons_does(
    some: tuple[int, int],
) -> None:
    alone, games = some
    won = np.arange(games) < alone
    _, high = paired_interval(won, np.zeros(games, dtype=bool), 0.95)
    assert high == pytest.approx(binomtest(alone, games).proportion_ci(0.95, "wilson").high, abs=1e-6)


def test_a_loss_as_large_as_the_margin_is_seldom_shown_to_be_smaller() -> None:
    """Exactly, of what wins no game alone and loses 5% of them: at most 2.5%, but for the counts being whole."""
    for games in (73, 100, 140, 200, 300, 900):
        shown = sum(
            binom.pmf(lost, games, 0.05)
            for lost in range(games // 10)
            if paired_interval(np.arange(games) >= lost, np.ones(games, dtype=bool), 0.95)[0] > -0.05
        )
        assert shown < 0.035


def test_the_paired_interval_covers_what_it_should() -> None:
    """Exactly, over all outcomes of 30 games of which the first wins alone 20% and the second alone 10%."""
    n, p, q, covered = 30, 0.2, 0.1, 0.0
    for first, second in product(range(n + 1), repeat=2):
        if first + second > n:
            continue
        a = np.array([True] * first + [False] * (n - first))
        b = np.array([False] * first + [True] * second + [False] * (n - first - second))
        low, high = paired_interval(a, b, 0.95)
        chance = comb(n, first) * comb(n - first, second) * p**first * q**second * (1 - p - q) ** (n - first - second)
        covered += chance * (low <= p - q <= high)
    assert 0.93 < covered < 0.98
