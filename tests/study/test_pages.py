"""A study's results on pages: the committed ones are what the committed results make."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation import places
from dmr_pipeline.evaluation.statistics import smallest_difference
from dmr_pipeline.study import pages
from dmr_pipeline.study.design import load_study
from dmr_pipeline.study.results import BesideReference, Results
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.pages import words
from tests.helpers.studies import made_up

KEPT = sorted(file.name.removesuffix(".study.json") for file in (REPOSITORY / places.RESULTS).glob("*.study.json"))
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PLACES = ("README.md", "docs/results/alfworld-smollm2.md", "docs/concepts/when-routing-pays.md")
"""Where it is told in words what studies of the real LLM have found with prompt lookup, as its recipe has it."""
WITHOUT = ("README.md", "docs/results/alfworld-smollm2-no-lookup.md", "docs/concepts/when-routing-pays.md")
"""And without."""


def span(ends: Sequence[float]) -> str:
    """An interval in points, as pages write it."""
    return " to ".join(f"{100 * end:.1f}" for end in ends)


def dearer(reference: BesideReference) -> str:
    """What a policy costs more than what it is compared with, as pages write it."""
    return f"{-reference.saved:.0%} more ({span([-end for end in reversed(reference.saved_ci95)])})"


@pytest.fixture(scope="module")
def found() -> Results:
    return made_up()


def test_every_study_that_is_kept_has_a_place_and_the_other_way_round() -> None:
    placed = {
        name for page in PAGES for name in re.findall(r"<!-- dmr study (\S+): ", page.read_text(encoding="utf-8"))
    }
    assert placed - {"STUDY"} == set(KEPT) != set()


@pytest.mark.parametrize("study", KEPT)
def test_committed_pages_are_made_from_the_committed_results(study: str) -> None:
    results = pages.read_results(study, REPOSITORY / places.RESULTS)
    assert results.study == load_study(REPOSITORY / "studies" / f"{study}.yaml")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert places.filled(text, page, "study", study, pages.parts_of(results)) == text, page


def test_what_is_said_of_the_rule_on_the_real_llm_is_what_its_results_say() -> None:
    found = pages.read_results("alfworld-smollm2-rules", REPOSITORY / places.RESULTS)
    points = {point.policy: point for point in found.points}
    rule, (to_high, to_low, to_oracle) = points["rule:margin"], found.references
    assert (to_high.against, to_low.against, to_oracle.against) == ("int8", "int4-gptq", "disagreement")
    low_end, high_end = (f"{100 * end:.1f}" for end in to_low.difference_ci95)
    _, page, concept = map(words, WITHOUT)
    more = f"{100 * to_low.difference:.1f} points more than int4"
    assert (
        f"Checking {rule.ratio:.0%} of int4's drafts wins {more} ({low_end} to {high_end}, p = {to_low.p_value:.3f}"
        in page
    )
    saved = [100 * end for end in to_high.saved_ci95]
    assert f"for {to_high.saved:.0%} less ({saved[0]:.1f} to {saved[1]:.1f})" in page
    left, dearer = -100 * to_oracle.difference, 100 * (1 - 1 / (1 - to_oracle.saved))
    left_low, left_high = (-100 * end for end in reversed(to_oracle.difference_ci95))
    assert f"would win {left:.1f} points more ({left_low:.1f} to {left_high:.1f}) for {dearer:.0f}% less" in page
    seen = 100 * to_oracle.smallest_difference
    assert f"{found.games} games show {seen:.1f} points; {left:.1f} take some 5,000 games" in page
    assert round(found.games * (seen / left) ** 2, -3) == 5000
    assert f"is [{left:.1f} points better and {dearer:.0f}% cheaper]" in concept
    gain = [100 * end for end in rule.gain_ci95]
    assert (
        f"interval of its gain at equal cost, {100 * rule.gain:.1f} points, lies above 0 ({gain[0]:.1f} to {gain[1]:.1f})"
        in page
    )
    assert (
        f"On {found.games} fresh games, in {rule.ratio:.0%} of the steps, it wins [{rule.success:.1%} at {rule.cost:.2f}]"
        in concept
    )
    assert f"{more} alone ({low_end} to {high_end}) and what int8 wins for {to_high.saved:.0%} less" in concept
    assert f"Its threshold was {rule.thresholds[0]:.3f}." in page
    assert to_low.saved_ci95[0] < 0 < to_low.saved_ci95[1]  # "not told from int4's"


def test_what_is_said_of_the_trained_routers_is_what_their_results_say() -> None:
    found = pages.read_results("alfworld-smollm2", REPOSITORY / places.RESULTS)
    points = {point.policy: point for point in found.points}
    beside = {(one.policy, one.against): one for one in found.references}
    compared = {one.router: one for one in found.compared}
    kl, both, planned = points["kl"], points["both"], compared["kl"]
    _, page, concept = map(words, WITHOUT)

    to_high, to_low, to_oracle = (beside["kl", against] for against in ("int8", "int4-gptq", "disagreement"))
    more = f"{100 * to_low.difference:.1f} points more than int4 ({span(to_low.difference_ci95)})"
    assert f"that of stage 1 wins {kl.success:.1%} at {kl.cost:.3f}, {more}" in page
    assert to_low.saved_ci95[0] < 0 < to_low.saved_ci95[1]  # "not told from int4's"
    cheaper = f"{to_high.saved:.0%} less ({span(to_high.saved_ci95)})"
    assert (
        f"{100 * to_high.difference:.1f} points more than int8 ({span(to_high.difference_ci95)}) for {cheaper}" in page
    )
    assert to_oracle.difference == 0
    gain = f"{100 * planned.difference:.1f} points more"
    assert f"{gain} at equal cost ({span(planned.difference_ci95)}), p = {planned.p_holm:.3f}" in page
    assert f"[{kl.success:.1%} at {kl.cost:.2f}]" in concept
    after = " and ".join(f"{-100 * compared[name].difference:.1f}" for name in ("kl-after", "advantage-after"))
    assert f"win {after} points less than the rule" in page
    assert f"{both.success:.1%} too, at {both.cost:.3f}" in page
    assert f"asks for int8 at {kl.ratio:.0%} of these steps, and costs {kl.cost:.3f}" in page
    assert len(found.compared) == 4  # "corrected for four"


def test_what_is_said_of_the_router_against_the_rule_is_what_its_results_say() -> None:
    found, before = (
        pages.read_results(f"alfworld-smollm2{name}", REPOSITORY / places.RESULTS) for name in ("-confirm", "")
    )
    points, first = ({point.policy: point for point in results.points} for results in (found, before))
    beside = {(one.policy, one.against): one for one in found.references}
    (planned,) = found.compared
    kl, rule = points["kl"], points["rule:margin"]
    _, page, concept = map(words, WITHOUT)

    assert found.study.first_game == before.games, "none of the games is one of those"
    assert [kl.thresholds, rule.thresholds] == [first["kl"].thresholds, first["rule:margin"].thresholds], (
        "nothing is new"
    )
    gain = f"{100 * planned.difference:.1f} points more at equal cost ({span(planned.difference_ci95)})"
    assert f"wins more than the rule**: {gain}, p = {planned.p_holm:.3f}, as the first 300 games had it" in page
    earlier = next(one for one in before.compared if one.router == "kl")
    assert round(100 * earlier.difference, 1) == round(100 * planned.difference, 1)
    assert kl.success > rule.success
    assert kl.cost < rule.cost
    assert f"{kl.success:.1%} at {kl.cost:.3f}, the rule {rule.success:.1%} at {rule.cost:.3f}" in page

    to_high, to_low, to_oracle = (beside["kl", against] for against in ("int8", "int4-gptq", "disagreement"))
    saved = f"what int8 wins for {to_high.saved:.0%} less"
    assert f"{saved}** ({span(to_high.saved_ci95)}): {100 * to_high.difference:.1f} points more" in page
    seen = f"where {found.games} games could have seen {100 * to_high.smallest_difference:.1f}"
    assert f"points more ({span(to_high.difference_ci95)}), {seen}" in page
    more = f"{100 * to_low.difference:.1f} points ({span(to_low.difference_ci95)})"
    assert f"{more} for {dearer(to_low)}" in page
    assert (
        f"and {100 * kl.gain:.1f} points ({span(kl.gain_ci95)}) against all that needs no router at equal cost" in page
    )
    of_rule, under = beside["rule:margin", "int4-gptq"], beside["rule:margin", "int8"]
    little = f"{100 * of_rule.difference:.1f} points more than int4 ({span(of_rule.difference_ci95)})"
    assert f"{little} for {-of_rule.saved:.0%} more, and {-100 * under.difference:.1f} less than int8" in page
    assert f"less than int8 ({span(under.difference_ci95)}) for {under.saved:.0%} less" in page
    checked, oracle = points["speculative:int8<int4-gptq"], points["disagreement"]
    assert f"Checking every draft wins {checked.success:.1%} at {checked.cost:.3f}" in page
    assert f"act differently wins {oracle.success:.1%} at {oracle.cost:.3f}" in page
    assert to_oracle.difference > 0

    in_brief = f"at equal cost ({span(planned.difference_ci95)}; p = {planned.p_holm:.3f}"
    assert f"{kl.success:.1%} at {kl.cost:.2f}, {saved} ({span(to_high.saved_ci95)})" in concept
    assert f"{100 * planned.difference:.1f} points more than the rule {in_brief}" in concept


def test_what_is_said_of_three_trainings_is_what_their_results_say() -> None:
    found, one = (
        pages.read_results(f"alfworld-smollm2-{name}", REPOSITORY / places.RESULTS) for name in ("seeds", "confirm")
    )
    points, (planned,) = {point.policy: point for point in found.points}, found.compared
    beside = {ref.against: ref for ref in found.references if ref.policy == "kl"}
    kl, high = points["kl"], points["always_int8"]
    readme, page, concept = map(words, WITHOUT)

    first = next(point for point in one.points if point.policy == "kl")
    assert kl.by_seed[0] == first.success, "the first is that of the study before"
    assert (found.games, found.study.first_game) == (one.games, one.study.first_game)
    by_seed = [f"{100 * difference:+.1f}" for difference in planned.difference_by_seed]
    assert all(difference > 0 for difference in planned.difference_by_seed)
    together = f"together {100 * planned.difference:.1f} ({span(planned.difference_ci95)}), p = {planned.p_holm:.3f}"
    assert f"by {by_seed[0]}, {by_seed[1]} and {by_seed[2]} points at equal cost; {together}" in page
    to_high, to_low = beside["int8"], beside["int4-gptq"]
    saved = f"what int8 wins for {to_high.saved:.0%} less** ({span(to_high.saved_ci95)})"
    assert f"{saved}: {100 * to_high.difference:.1f} points more ({span(to_high.difference_ci95)})" in page
    more = f"{100 * to_low.difference:.1f} points ({span(to_low.difference_ci95)})"
    assert f"{more} for {dearer(to_low)}, and {100 * kl.gain:.1f} points ({span(kl.gain_ci95)})" in page
    assert (
        f"{', '.join(f'{won:.1%}' for won in kl.by_seed)}, a standard deviation of {100 * kl.seed_deviation:.1f}"
        in page
    )

    alone = f"int8 {high.success:.1%} at {high.cost:.2f})"
    assert f"for {to_high.saved:.0%} less ({kl.success:.1%} at {kl.cost:.2f}; {alone}" in readme
    more = f"{100 * to_low.difference:.1f} points more than int4 ({span(to_low.difference_ci95)})"
    gain = f"{100 * planned.difference:.1f} more than the rule at equal cost ({span(planned.difference_ci95)}"
    assert f"{alone}, {more}, and {gain}; p = {planned.p_holm:.3f})" in readme
    than_rule = f"{100 * planned.difference:.1f} points more than the rule ({span(planned.difference_ci95)})"
    assert f"win {kl.success:.1%} at {kl.cost:.2f}, {than_rule}" in concept


def test_what_is_said_of_a_head_of_int4_is_what_its_results_say() -> None:
    found = pages.read_results("alfworld-smollm2-head4", REPOSITORY / places.RESULTS)
    before = pages.read_results("alfworld-smollm2-rules", REPOSITORY / places.RESULTS)
    points, others = ({point.policy: point for point in results.points} for results in (found, before))
    rule, low, old = points["rule:margin"], points["always_int4-gptq"], others["always_int4-gptq"]
    _, page, concept = map(words, WITHOUT)
    assert found.games == before.games
    assert low.success == old.success
    assert f"({low.success:.1%} both times), for {1 - low.cost / old.cost:.0%} less" in page
    to_high, to_low, _ = found.references

    assert (
        f"{to_high.saved:.0%} ({span(to_high.saved_ci95)}), against {before.references[0].saved:.0%} with a head"
        in page
    )
    assert f"less than int8, {-100 * to_high.difference:.1f} points, 300 games" in page
    assert f"from nothing ({span(to_high.difference_ci95)})" in page
    more = f"{100 * to_low.difference:.1f} points ({span(to_low.difference_ci95)}), for {-to_low.saved:.0%} more"
    assert more in page
    ladders = (f"{one.success:.1%} at {one.cost:.3f}" for one in (rule, others["rule:margin"]))
    assert f"tell either: {' here, '.join(ladders)} there" in page
    assert f"it saves {to_high.saved:.0%}" in concept


def test_what_is_said_of_prompt_lookup_is_what_its_results_say() -> None:
    found, before = (
        pages.read_results(f"alfworld-smollm2-{name}", REPOSITORY / places.RESULTS) for name in ("lookup", "head4")
    )
    points, others = ({point.policy: point for point in results.points} for results in (found, before))
    rule, high, low = (points[name] for name in ("rule:margin", "always_int8", "always_int4-gptq"))
    to_high, to_low, _ = found.references
    readme, page, concept = map(words, PLACES)

    less = [f"{1 - points[name].cost / others[name].cost:.0%}" for name in (high.policy, low.policy, "always_float")]
    there = "[without it](alfworld-smollm2-no-lookup.md#a-head-of-int4)"
    assert f"int8 alone costs {less[0]} less than {there}, int4 {less[1]} less, bfloat16 {less[2]} less" in page
    assert f"int8 with it, {high.success:.1%} at {high.cost:.3f}, costs less than int4" in page
    without = [*others.values(), *pages.read_results("alfworld-smollm2", REPOSITORY / places.RESULTS).points]
    assert high.cost < min(point.cost for point in without if point.kind != "oracle")
    assert f"{to_high.saved:.0%} of int8's cost ({span(to_high.saved_ci95)}), against" in page
    assert f"against {before.references[0].saved:.0%}. What it wins less" in page
    lost = f"less than int8, {-100 * to_high.difference:.1f} points, 300 games cannot tell"
    assert f"{lost} from nothing ({span(to_high.difference_ci95)})" in page
    dearer = [f"{-results.references[1].saved:.0%}" for results in (found, before)]
    assert f"The rule costs {dearer[0]} more than int4 alone, against {dearer[1]}," in page
    assert f"equal cost, {100 * rule.gain:.1f} points ({span(rule.gain_ci95)}), is not told from 0" in page
    assert others["rule:margin"].gain_ci95[0] < 0 < others["rule:margin"].gain_ci95[1]
    assert f"drafts costs {points['speculative:int8<int4-gptq'].cost:.3f}, hardly less" in page
    assert f"int8 wins {high.success:.1%} here and {others['always_int8'].success:.1%} there" in page
    assert f"int8 alone then wins {high.success:.1%} of {found.games} fresh games at {high.cost:.2f}" in readme
    assert f"for {others['always_int8'].cost:.2f} without" in readme
    assert f"[{high.success:.1%} at {high.cost:.2f}](../results/alfworld-smollm2.md#prompt-lookup)" in concept
    assert f"prompt-lookup), for {others['always_int8'].cost:.2f} without: less than int4" in concept
    assert f"saves {to_high.saved:.0%} of int8's cost, but {-to_low.saved:.0%} is what it then costs more" in concept


def test_what_is_said_of_the_router_beside_prompt_lookup_is_what_its_results_say() -> None:
    found, rules, without = (
        pages.read_results(f"alfworld-smollm2-{name}", REPOSITORY / places.RESULTS)
        for name in ("lookup-router", "lookup", "head4")
    )
    points, old, plain = ({point.policy: point for point in one.points} for one in (found, rules, without))
    beside, (planned,) = {(one.policy, one.against): one for one in found.references}, found.compared
    kl, rule, oracle, rule_before = points["kl"], points["rule:margin"], points["disagreement"], old["rule:margin"]
    to_high, to_low = beside["kl", "int8"], beside["kl", "int4-gptq"]
    _, page, concept = map(words, PLACES)
    assert found.study.precisions == rules.study.precisions
    assert found.games == rules.games == without.games
    assert (found.study.first_game, rules.study.first_game, without.study.first_game) == (0, 0, 0)

    saved = f"for {to_high.saved:.0%} less than int8 ({span(to_high.saved_ci95)})"
    assert f"{kl.success:.1%} at {kl.cost:.3f}, {saved}" in page
    lost = f"wins less, {-100 * to_high.difference:.1f} points, {found.games} games cannot tell from nothing"
    assert f"{lost} ({span(to_high.difference_ci95)})" in page
    more = f"{100 * to_low.difference:.1f} points more ({span(to_low.difference_ci95)})"
    assert f"{more} for {dearer(to_low)}" in page
    assert to_high.saved > without.references[0].saved, "as much as without it, and more"
    both = 1 - kl.cost / plain["always_int8"].cost
    assert (
        f"{both:.0%} less, {kl.cost:.3f} for [{plain['always_int8'].cost:.3f}](alfworld-smollm2-no-lookup.md#a-head-of-int4)"
        in page
    )
    gain = f"{100 * planned.difference:.1f} points at equal cost ({span(planned.difference_ci95)})"
    assert f"won more than the rule on these games**: {gain}, p = {planned.p_holm:.3f}" in page
    ours, theirs = (f"{one.success:.1%} at {one.cost:.3f}" for one in (rule, rule_before))
    assert f"these same games: {ours} for {theirs}" in page
    assert f"gave is {rule.thresholds[0]:.3f} for {rule_before.thresholds[0]:.3f}" in page
    assert f"int8 won {old['always_int8'].success:.1%} there" in page
    assert f"would lead by {100 * (kl.success - rule_before.success):.1f} points at a lower cost" in page
    assert kl.cost < rule_before.cost
    assert f"the oracle wins {oracle.success:.1%} at {oracle.cost:.3f}" in page

    assert f"A trained router led by {100 * planned.difference:.1f} points on [these games]" in concept


def test_what_is_said_of_the_router_beside_prompt_lookup_on_other_games_is_what_its_results_say() -> None:
    found, first, without = (
        pages.read_results(f"alfworld-smollm2-{name}", REPOSITORY / places.RESULTS)
        for name in ("lookup-confirm", "lookup-router", "confirm")
    )
    points, before = ({point.policy: point for point in results.points} for results in (found, first))
    beside, (planned,) = {(one.policy, one.against): one for one in found.references}, found.compared
    readme, page, concept = map(words, PLACES)
    assert found.study.first_game == first.games, "other games"
    for policy in ("kl", "rule:margin"):
        assert points[policy].thresholds == before[policy].thresholds, "nothing was tuned anew"
    kl, rule, high, oracle = (points[name] for name in ("kl", "rule:margin", "always_int8", "disagreement"))
    led, p = f"{100 * planned.difference:.1f}", f"p = {planned.p_holm:.3f}"
    within = f"({span(planned.difference_ci95)})"
    assert planned.p_holm > 0.05, "does not beat the rule"
    (earlier,) = first.compared
    had = f"{100 * earlier.difference:.1f} and p = {earlier.p_holm:.3f}"
    assert f"{led} points more at equal cost {within}, {p}, where the 300 games before had {had}." in page
    said = {name: f"{points[name].success:.1%} at {points[name].cost:.3f}" for name in ("kl", "rule:margin")}
    assert f"rule wins {said['rule:margin']}, the router {said['kl']}. [Without" in page
    assert f"-games) it does, by {100 * without.compared[0].difference:.1f}." in page
    router, untrained = beside["kl", "int8"], beside["rule:margin", "int8"]
    took, lost = (
        [f"{one.saved:.0%} less ({span(one.saved_ci95)})" for one in (router, untrained)],
        [
            f"{-100 * one.difference:.1f}{points_} ({span((-one.difference_ci95[1], -one.difference_ci95[0]))})"
            for one, points_ in ((router, " points"), (untrained, ""))
        ],
    )
    assert f"takes {took[0]} and loses {lost[0]}, the rule {took[1]} and {lost[1]}." in page
    checks = points["speculative:int8<int4-gptq"]
    assert f"Checking every draft saves {1 - checks.cost / high.cost:.0%}." in page
    low, rule_low = beside["kl", "int4-gptq"], beside["rule:margin", "int4-gptq"]
    more = f"{100 * low.difference:.1f} points ({span(low.difference_ci95)}) for {-low.saved:.0%} more"
    rule_more = f"{100 * rule_low.difference:.1f} ({span(rule_low.difference_ci95)}) for {-rule_low.saved:.0%} more"
    assert f"{more}, and {rule_more}." in page
    left = beside["kl", "disagreement"]
    ahead = f"{-100 * left.difference:.1f} points more than the router"
    assert f"the oracle wins {oracle.success:.1%} at {oracle.cost:.3f}, {ahead}" in page
    assert f"for {1 - oracle.cost / kl.cost:.0%} less." in page

    costs = f"it wins {rule.success:.1%} at {rule.cost:.2f}, the router {kl.success:.1%} at {kl.cost:.2f}, int8"
    saved = f"{untrained.saved:.0%} and {router.saved:.0%} less"
    against = f"{100 * rule_low.difference:.1f} and {100 * low.difference:.1f} points more than int4,"
    paid = f"for {-rule_low.saved:.0%} and {-low.saved:.0%} more."
    assert f"{costs} {high.success:.1%} at {high.cost:.2f}: {saved}, and {against} {paid}" in readme
    (threshold,) = rule.thresholds
    assert f'was {threshold:.3f} here: `dmr serve alfworld-smollm2 --static "margin>{threshold:.3f}"`' in page
    assert f"At equal cost the router leads by {led} {within}." in readme
    there = f"{said['kl']}, the rule {said['rule:margin']}, {router.saved:.0%} and {untrained.saved:.0%} less"
    assert f"and by {led} {within} on [900 others]" in concept
    assert f"games): {there} than int8 with prompt lookup." in concept


def test_what_is_said_of_the_router_on_official_games_is_what_its_results_say() -> None:
    found, tuned = (
        pages.read_results(f"alfworld-smollm2-{name}", REPOSITORY / places.RESULTS)
        for name in ("lookup-seen", "lookup-router")
    )
    points, before = ({point.policy: point for point in results.points} for results in (found, tuned))
    beside, (planned,) = {(one.policy, one.against): one for one in found.references}, found.compared
    readme, page, concept = map(words, PLACES)
    for policy in ("kl", "rule:margin"):
        assert points[policy].thresholds == before[policy].thresholds, "nothing was tuned on official games"
    said = {name: f"{point.success:.1%} at {point.cost:.3f}" for name, point in points.items()}
    to_high, to_low = beside["kl", "int8"], beside["kl", "int4-gptq"]
    lost = f"{100 * to_high.difference:+.1f} points ({span(to_high.difference_ci95)})"
    saved = f"for {to_high.saved:.0%} less ({span(to_high.saved_ci95)})"
    assert f"the router wins {said['kl']}**, int8 {said['always_int8']}: {lost} {saved}" in page
    assert f"The rule wins {said['rule:margin']}, int4 alone {said['always_int4-gptq']}." in page
    against = f"{100 * planned.difference:+.1f} points ({span(planned.difference_ci95)}), p = {planned.p_holm:.3f}"
    more = f"{100 * to_low.difference:+.1f} ({span(to_low.difference_ci95)})"
    seen = f"could have seen {100 * to_low.smallest_difference:.1f}."
    assert f"equal cost {against}; against int4 alone {more}, where they {seen}" in page
    assert planned.p_holm > 0.05, "which cannot be told"
    low, high, kl = (points[name] for name in ("always_int4-gptq", "always_int8", "kl"))
    assert low.success == high.success == kl.success
    assert f"int4 alone won as many as int8, for {1 - low.cost / high.cost:.0%} less" in page
    there = f"{found.games} [official games](docs/results/alfworld-smollm2.md#the-official-games)"
    assert f"on {there} int8 and int4 win {high.success:.1%} each." in readme
    assert f"On the {found.games} official games int4 alone [won as many]" in concept


def test_what_is_said_of_webshop_is_what_its_results_say() -> None:
    found = pages.read_results("webshop-smollm2-rules", REPOSITORY / places.RESULTS)
    points, (to_high, to_low, _) = {point.policy: point for point in found.points}, found.references
    rule, full, high, low, oracle = (
        points[name] for name in ("rule:margin", "always_float", "always_int8", "always_int4-gptq", "disagreement")
    )
    readme, page, concept = map(words, ("README.md", "docs/results/webshop-smollm2.md", PLACES[2]))
    assert f"{low.success:.1%} for bfloat16's {full.success:.1%} and int8's {high.success:.1%}" in page
    more = f"{100 * to_high.difference:.1f} points more than int8 ({span(to_high.difference_ci95)})"
    assert f"{more} for {to_high.saved:.0%} less ({span(to_high.saved_ci95)})" in page
    more = f"{100 * to_low.difference:.1f} points ({span(to_low.difference_ci95)})"
    assert f"{more} for {dearer(to_low)}" in page
    assert f"at equal cost {100 * rule.gain:.1f} points ({span(rule.gain_ci95)})" in page
    assert f"differently in {oracle.ratio:.0%} of the steps" in page
    assert f"wins {oracle.success:.1%} at {oracle.cost:.3f}" in page
    assert f"at {rule.ratio:.0%} of the steps, not a fifth" in page
    assert 2.8 < full.cost / low.cost < 3.3
    said = f"wins {low.success:.1%} of {found.games} test goals at int4, {full.success:.1%} in bfloat16"
    assert f"{said} for three times the cost" in readme
    assert f"beside prompt lookup, {to_high.saved:.0%}." in concept
    assert f"with prompt lookup; {low.success:.1%} and {full.success:.1%} of {found.games} test goals" in concept


def test_what_is_said_of_the_official_games_is_what_their_results_say() -> None:
    found = pages.read_results("alfworld-smollm2-seen", REPOSITORY / places.RESULTS)
    elsewhere = pages.read_results("alfworld-smollm2-rules", REPOSITORY / places.RESULTS)
    points, others = ({point.policy: point for point in results.points} for results in (found, elsewhere))
    rule, high, full = (points[name] for name in ("rule:margin", "always_int8", "always_float"))
    assert rule.thresholds == others["rule:margin"].thresholds, "the same rule"
    to_high, to_low, _ = found.references
    _, page, concept = map(words, WITHOUT)
    assert f"{full.success:.1%} in bfloat16, {others['always_float'].success:.1%} of those" in page
    low, up = (100 * end for end in to_high.difference_ci95)
    saved = [100 * end for end in to_high.saved_ci95]
    assert rule.success == high.success
    assert (
        f"what int8 wins ({low:.1f} to {up:.1f}) for {to_high.saved:.0%} less ({saved[0]:.1f} to {saved[1]:.1f})"
        in page
    )
    difference, seen = 100 * to_low.difference, 100 * to_low.smallest_difference
    assert f"{found.games} games cannot tell: {difference:.1f} points, where they could have seen {seen:.1f}" in page
    assert f"on the {found.games} official valid_seen games [what int8 wins for {to_high.saved:.0%} less]" in concept


def test_the_tables_say_what_the_results_say(found: Results) -> None:
    parts = pages.parts_of(found)
    table, comparisons = (parts[part](Path("page.md")) for part in ("table", "comparisons"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert rows[0] == ["policy", "budget", "success", "seeds ±", "ratio", "cost", "gain at equal cost"]
    assert len(rows) == 2 + len(found.points)
    for row, point in zip(rows[2:], found.points, strict=True):
        assert row[0] == point.policy
        assert row[1] == ("" if point.budget is None else str(point.budget))
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", " ".join([row[2], row[5]]))]
        success, low, high, cost, *_ = numbers
        assert [success, low, high] == pytest.approx([100 * x for x in (point.success, *point.success_ci95)], abs=0.051)
        assert cost == pytest.approx(point.cost, abs=5e-4)
        assert (row[3] == "") == (len(point.by_seed) == 1)
    assert "200 games of seeds that no split uses" in table
    assert "Prompt lookup" not in table
    listed = found.model_copy(update={"fresh": False, "prompt_lookup": True})
    told = pages.parts_of(listed)["table"](Path("page.md"))
    assert "200 games of the test split" in told
    assert "Prompt lookup at every precision" in told
    assert "seeds 0, 1" in table
    ends = [line for line in parts["references"](Path("page.md")).splitlines() if line.startswith("| rule:fair | 0.4")]
    # Of 200 games that end alike, with half a game in each of the four cells: 1/202 of them differ.
    seen = 100 * smallest_difference(np.zeros(200), 0.05)
    assert ends[0] == f"| rule:fair | 0.4 | float alone | +0.0 [0.0, 0.0] | 1.000 | {seen:.1f} | 40% [40.0, 40.0] |"
    assert ends[1].startswith("| rule:fair | 0.4 | int2 alone | +40.0 [")
    assert ends[2].startswith("| rule:fair | 0.4 | the oracle | +0.0 [")
    (good, poor) = (one for one in found.compared)
    lines = [line for line in comparisons.splitlines() if line.startswith(("| good", "| poor"))]
    assert [f"| {one.rule} |" in line for one, line in zip((good, poor), lines, strict=True)] == [True, True]
    assert ["not shown" in line for line in lines] == [not good.not_worse, not poor.not_worse]
    assert ["| +0.0, +10.0 |" in lines[0], "| +10.0, -10.0 |" in lines[1]] == [True, True]  # of each training
    one_training = [one.model_copy(update={"difference_by_seed": [0.1]}) for one in found.compared]
    alone = pages.parts_of(found.model_copy(update={"compared": one_training}))["comparisons"](Path("page.md"))
    assert "of each training" in comparisons
    assert "of each training" not in alone


def test_a_study_is_kept_and_written(found: Results, tmp_path: Path) -> None:
    page = tmp_path / "docs/page.md"
    page.parent.mkdir()
    page.write_text(
        "Before.\n\n<!-- dmr study x: comparisons -->\nold\n<!-- end -->\n\n<!-- dmr report x: table -->\n<!-- end -->\n"
    )
    with pytest.raises(UserError, match=r"x\.study\.json is not there"):
        pages.write_pages("x", tmp_path)
    file = pages.results_file("x", tmp_path / places.RESULTS)
    file.parent.mkdir()
    file.write_text("{}")
    with pytest.raises(UserError, match="another version"):
        pages.write_pages("x", tmp_path)
    file.write_text(found.model_dump_json())
    assert pages.write_pages("x", tmp_path) == {page: True}
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- dmr study x: comparisons -->\n\n| router |")
    assert text.endswith("<!-- end -->\n\n<!-- dmr report x: table -->\n<!-- end -->\n")
    assert pages.write_pages("x", tmp_path) == {page: False}
    page.write_text("<!-- dmr study x: picture -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="there are table, references, comparisons"):
        pages.write_pages("x", tmp_path)


def test_what_is_said_of_fifteen_routers_is_what_their_results_say() -> None:
    found = pages.read_results("alfworld-tiny-study", REPOSITORY / places.RESULTS)
    page = words("docs/results/alfworld-tiny.md")
    points, compared = {one.policy: one for one in found.points}, {one.router: one for one in found.compared}
    rule, routers = points["rule:margin_capped"], [one for one in found.points if one.kind == "router"]
    assert (len(routers), len(found.compared)) == (15, 15)
    assert {one.rule for one in found.compared} == {"rule:margin_capped"}
    assert all(one.success < rule.success and one.cost > rule.cost for one in routers)
    assert f"It wins {rule.success:.1%} at {rule.cost:.3f}, more than any router and for less" in page
    near = [points[name] for name in ("both-branches", "neighbours-after")]
    assert sorted(routers, key=lambda one: -one.success)[:2] == near
    assert f"win {near[0].success:.1%} at {near[0].cost:.3f} and {near[1].success:.1%} at {near[1].cost:.3f}" in page
    first, second = (compared.pop(one.policy) for one in near)
    less = [f"({span((-one.difference_ci95[1], -one.difference_ci95[0]))})" for one in (first, second)]
    assert (
        f"{-100 * first.difference:.1f} points less {less[0]} and {-100 * second.difference:.1f} less {less[1]}" in page
    )
    assert all(one.difference < 0 for one in compared.values())
    assert f"corrected p of {max(one.p_holm for one in compared.values()):.3f} at most" in page
    high, low = points["always_float"], points["always_int2"]
    assert f"which costs {high.cost:.3f} here, less than int2's {low.cost:.3f}" in page
    stages = (points[name].success for name in ("both-branches", "both", "kl"))
    assert "{:.1%} where whole episodes give {:.1%}, both from the same stage 1 ({:.1%})".format(*stages) in page
    oracle, int4 = points["oracle-divergence"], points["always_int4"]
    more = f"{100 * (oracle.success - rule.success):.1f} points more than the cascade"
    assert f"wins {oracle.success:.1%} at {oracle.cost:.3f} with as many dear steps, {more}" in page
    assert f"int4 alone, {int4.success:.1%} at {int4.cost:.3f}" in page
