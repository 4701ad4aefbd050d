"""Rules on scripted transcripts: what each asks for, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, log
from types import SimpleNamespace

import pytest
import torch

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.policy import Draft
from dmr_pipeline.rollout.reading import NOTHING
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.budgets import NOBODY, AtBar, Bar
from dmr_pipeline.router.rules import CAP_TURN, GOLDEN, Rule, named_at, rule_at_bar, rules
from tests.helpers.rollouts import LOW, PROMPTER, ROUTE, THREE, roll, taken, transcript

GAME = generate_game(0)[0]
LIMIT = 20


@dataclass
class Script:
    """A `DecisionContext` of one slot, with what the cheapest precision would do."""

    margin: float = 1.0
    entropy: float = 0.0
    command: list[int] = field(default_factory=lambda: [5])
    asked: list[str] = field(default_factory=list)
    """Precisions whose drafts were asked for."""
    can_check: bool = True

    def drafts(self, precision: str, slots: Sequence[int]) -> list[Draft]:
        self.asked.append(precision)
        return [Draft(self.command, NOTHING, self.margin, entropy=self.entropy)] * len(slots)

    def admissible_commands(self, slots: Sequence[int]) -> list[Sequence[str]]:
        return [["look", "go to desk 1"]] * len(slots)

    def states(self, slots: Sequence[int], layers: Sequence[int]) -> None:
        raise AssertionError("no rule reads states")


def named(name: str, route: Sequence[str] = ROUTE, check: bool = True, seed: int = 0) -> Rule:
    prompter = SimpleNamespace(command=lambda tokens: {5: "look", 6: "dance"}[tokens[0]])
    return rules(route, LIMIT, prompter, check, seed)[name]


def levels(
    rule: Rule, segments: Sequence[int], actions: Sequence[int] | None = None, scripts: Sequence[Script] | None = None
) -> list[float]:
    """Of an episode of one-token segments and actions."""
    found = []
    rule.begin(0, RolloutRequest(GAME))
    for turn, segment in enumerate(segments):
        (decision,) = rule.decide([0], [[segment]], scripts[turn] if scripts else Script())
        assert decision.precision == rule.route[0]
        found.append(decision.exceedance[0])
        rule.acted(0, [segment], "int2", [actions[turn] if actions else turn])
    return found


def test_the_first_steps_and_the_last_ones() -> None:
    assert levels(named("first"), range(4)) == [1.0, 0.95, 0.9, 0.85]
    assert levels(named("last"), range(4)) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert levels(named("first"), range(25))[-1] == 0.0  # beyond the step limit that they are made for
    assert levels(named("last"), range(25))[-1] == 1.0


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1 / 3, 0.5, 0.8])
def test_evenly_is_every_nth_step_or_so(ratio: float) -> None:
    found = levels(named("evenly"), range(300))
    acting = [turn for turn, level in enumerate(found) if level >= 1 - ratio]
    assert len(acting) == pytest.approx(300 * ratio, abs=2)
    gaps = {after - before for before, after in pairwise(acting)}
    assert len(gaps) <= 3
    assert min(gaps) >= 1 / ratio / 2
    assert max(gaps) <= 2.7 / ratio
    assert found[:3] == pytest.approx([1, 1 - GOLDEN, 2 - 2 * GOLDEN])


def test_stuck_counts_repeats_of_the_observation_and_of_the_command() -> None:
    # Observations 1 2 1 1 3 4; commands 7 8 7 9 9 9: before the last step the command 9 was issued twice.
    found = levels(named("stuck"), [1, 2, 1, 1, 3, 4], [7, 8, 7, 9, 9, 9])
    assert found == [0, 0, 1 / 2, 3 / 4, 0, 1 / 2]


def test_the_draft_s_margin_and_its_command_decide_after_it() -> None:
    scripts = [Script(margin=0.9), Script(margin=0.25, entropy=log(4), command=[6])]
    assert levels(named("margin"), [1, 2], scripts=scripts) == pytest.approx([0.1, 0.75])
    assert levels(named("entropy"), [1, 2], scripts=scripts) == pytest.approx([0, 3 / 4])
    assert levels(named("inadmissible"), [1, 2], scripts=scripts) == [0.0, 1.0]
    assert [script.asked for script in scripts] == [["int2"] * 3] * 2


def test_capped_rules_ask_for_nothing_late_and_look_at_nothing() -> None:
    scripts = [Script(margin=0.2) for _ in range(CAP_TURN + 2)]
    found = levels(named("margin_capped"), range(CAP_TURN + 2), scripts=scripts)
    assert found == [0.8] * CAP_TURN + [0.0] * 2
    assert [len(script.asked) for script in scripts] == [1] * CAP_TURN + [0] * 2
    assert levels(named("stuck_capped"), [1] * (CAP_TURN + 1))[-2:] == [(CAP_TURN - 1) / CAP_TURN, 0.0]
    assert "margin_capped" not in rules(ROUTE, CAP_TURN, PROMPTER, True, 0)


def test_one_decision_an_episode() -> None:
    scripts = [Script(margin=0.3), Script(margin=0.9), Script(margin=0.1)]
    assert levels(named("episode_margin"), range(3), scripts=scripts) == pytest.approx([0.7] * 3)
    assert [len(script.asked) for script in scripts] == [1, 0, 0]
    lots = {seed: levels(named("episode", seed=seed), range(3)) for seed in range(50)}
    assert all(len(set(found)) == 1 for found in lots.values())
    shares = [found[0] for found in lots.values()]
    assert len(set(shares)) == 50
    assert 0.3 < sum(shares) / 50 < 0.7


def test_who_is_told_what_was_played_goes_on_as_who_was_asked() -> None:
    """As a session does that comes back after it had to leave its place."""
    segments, actions = [1, 2, 1, 1, 3, 4], [7, 8, 7, 9, 9, 9]
    for name in ("stuck", "first", "last", "evenly", "episode"):
        wanted, told = levels(named(name), segments, actions), named(name)
        told.begin(0, RolloutRequest(GAME))
        for segment, action in zip(segments[:-1], actions, strict=False):
            told.acted(0, [segment], "int2", [action])
        (decision,) = told.decide([0], [[segments[-1]]], Script())
        assert decision.exceedance[0] == wanted[-1], name


@pytest.mark.parametrize("rule", ["first", "stuck", "evenly", "margin"])
@pytest.mark.parametrize("ties", [0.0, 1.0])
def test_a_name_says_what_its_bar_does_where_levels_are_just_the_threshold(rule: str, ties: float) -> None:
    there, segments = rules(ROUTE, LIMIT, PROMPTER, True, 0), [1, 2, 1, 1, 3]
    threshold = levels(named(rule), segments, scripts=[Script(margin=0.3) for _ in segments])[2]
    bar = Bar(threshold, ties)

    def decided(policy: AtBar) -> list[str]:
        found = []
        policy.begin(0, RolloutRequest(GAME))
        for segment in segments:
            (decision,) = policy.decide([0], [[segment]], Script(margin=0.3))
            found.append(decision.precision)
            policy.acted(0, [segment], decision.precision, [5])
        return found

    name = named_at(rule, bar)
    assert name is not None
    assert decided(rule_at_bar(name, there, ROUTE)) == decided(AtBar(named(rule), ROUTE, bar))


def test_what_a_name_cannot_say_has_none() -> None:
    assert named_at("stuck", Bar(0.0, ties=1.0)) is None  # all steps
    assert named_at("stuck", Bar(0.4, ties=0.5)) is None
    assert named_at("margin", Bar(0.4, sample=True)) is None
    assert named_at("margin", Bar(0.4, strict=0.2)) is None
    assert named_at("episode_margin", Bar(0.4)) is None


def test_a_rule_at_a_threshold_by_its_name() -> None:
    there = rules(ROUTE, LIMIT, PROMPTER, True, 0)
    name = named_at("margin", Bar(0.4, ties=0.0))
    assert name == "margin>0.4"
    at_bar = rule_at_bar(name, there, ROUTE)
    found = []
    at_bar.begin(0, RolloutRequest(GAME))
    for turn, margin in enumerate((0.9, 0.6, 0.599, 0.1)):
        (decision,) = at_bar.decide([0], [[turn]], Script(margin=margin))
        found.append((decision.precision, decision.drafter))
        at_bar.acted(0, [turn], decision.precision, [5])
    assert found == [("int2", None)] * 2 + [("float", "int2")] * 2
    for text, said in (
        ("sense>0.4", "'sense' is no rule that can be deployed"),
        ("episode_margin>0.4", "is no rule that can be deployed"),
        ("margin>x", "such as margin>0.4"),
        ("margin>nan", "such as margin>0.4"),
        ("margin>1.5", "such as margin>0.4"),
        ("margin>", "such as margin>0.4"),
    ):
        with pytest.raises(UserError, match=said):
            rule_at_bar(text, there, ROUTE)


@pytest.mark.parametrize("check", [True, False])
def test_rules_after_the_draft_check_it_where_they_may(check: bool) -> None:
    by_drafter: dict[str | None, set[str]] = {}
    for name, rule in rules(THREE, LIMIT, PROMPTER, check, 0).items():
        by_drafter.setdefault(rule.drafter, set()).add(name)
    assert by_drafter.get("int2", set()) == (
        {"margin", "margin_capped", "entropy", "entropy_capped", "inadmissible"} if check else set()
    )


@torch.no_grad()
def test_a_draft_s_entropy_is_its_greatest() -> None:
    played = roll(AtBar(rules(ROUTE, 6, PROMPTER, True, 0)["entropy"], ROUTE, NOBODY))
    for trajectory in played[:3]:
        for turn, step in enumerate(trajectory.steps[:3]):
            prefix = transcript(trajectory, turn)
            logits = LOW(torch.tensor([prefix + step.action[:-1]])).logits[0, len(prefix) - 1 :]
            greatest = float(torch.distributions.Categorical(logits=logits).entropy().max())
            assert step.exceedance[0] == pytest.approx(1 - exp(-greatest), abs=1e-4)


@pytest.mark.parametrize("check", [True, False])
def test_a_rule_in_the_engine_takes_the_dearest_s_actions_where_it_acts(check: bool) -> None:
    """Checked or written anew: the same episodes, the first for fewer passes of the dearest."""
    rule = rules(ROUTE, 6, PROMPTER, check, 0)["margin"]
    everywhere, nowhere = (roll(AtBar(rule, ROUTE, Bar(threshold))) for threshold in (0.0, 2.0))
    assert taken(everywhere) == taken(roll(AtBar(rules(ROUTE, 6, PROMPTER, False, 0)["random"], ROUTE, Bar(0.0))))
    assert {step.precision for trajectory in nowhere for step in trajectory.steps} == {"int2"}
    seen = sorted(step.exceedance[0] for trajectory in nowhere for step in trajectory.steps)
    played = roll(AtBar(rule, ROUTE, Bar(seen[len(seen) // 2])))
    steps = [step for trajectory in played for step in trajectory.steps]
    assert {step.precision for step in steps} == set(ROUTE)
    for step in steps:
        dear = step.precision == "float"
        assert dear == (step.exceedance[0] >= seen[len(seen) // 2])
        assert (step.drafted > 0) == (dear and check)
