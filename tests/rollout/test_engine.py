"""Rollouts: exact switching between precisions, independent of how episodes are batched."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.choosing import drawn
from dmr_pipeline.rollout.engine import play, play_alone
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.policy import Decision, DecisionContext, Forced
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory, warn_of_outgrown
from dmr_pipeline.router.baselines import Confidence, Disagreement, RandomMixing
from tests.helpers.rollouts import (
    ALL_HIGH,
    ALL_LOW,
    HALF,
    HIGH,
    LOW,
    MODELS,
    PROMPTER,
    ROUTE,
    RUNS,
    STEPS,
    THREE,
    but_for_rounding,
    greedy_uncached,
    passes_over,
    roll,
    streams_of,
    taken,
    transcript,
)


@pytest.mark.parametrize("route", [ROUTE, THREE])
def test_every_action_is_the_acting_precisions_own_without_any_cache(route: tuple[str, ...]) -> None:
    played = roll(RandomMixing(dict.fromkeys(route, 1 / len(route)), seed=3), route=route)
    assert {step.precision for trajectory in played for step in trajectory.steps} == set(route)
    for trajectory in played:
        for turn, step in enumerate(trajectory.steps):
            assert step.action == greedy_uncached(MODELS[step.precision], transcript(trajectory, turn))


@pytest.mark.parametrize("reward", [2.0, -0.5, float("nan")])
def test_a_reward_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, reward: float) -> None:
    world = type(RUNS[0].task.episode())
    plain = world.step
    monkeypatch.setattr(world, "step", lambda episode, command: (plain(episode, command)[0], reward, True))
    with pytest.raises(
        UserError, match=rf"task {RUNS[0].task.task_id}: its reward is {reward}, and rewards are in \[0, 1\]"
    ):
        roll(ALL_HIGH)


def test_an_action_ends_with_the_models_own_eos() -> None:
    whole = next(a for episode in taken(roll(ALL_HIGH)) for a in episode if len(a) > 2 and a[1] != a[0])
    stopping = Prompter.of(PROMPTER.tokenizer, PROMPTER.prompt, GenerationConfig(eos_token_id=whole[1]))
    agents = {rung: Streams(HIGH, 7, 2048) for rung in ROUTE}
    actions = [a for episode in taken(play(RUNS, agents, stopping, ALL_HIGH, STEPS)) for a in episode]
    assert whole[:2] in actions
    assert all(whole[1] not in action[:-1] for action in actions)


def test_the_disagreement_oracle_repeats_always_high() -> None:
    oracle, high, low = roll(Disagreement(ROUTE)), roll(ALL_HIGH), roll(ALL_LOW)
    assert taken(oracle) == taken(high)
    assert taken(low) != taken(high)
    ratios = [trajectory.share("float") for trajectory in oracle]
    assert 0 < sum(ratios) < len(ratios)


def test_the_oracle_of_three_takes_the_cheapest_that_does_what_the_dearest_does() -> None:
    played = roll(Disagreement(THREE), route=THREE)
    assert taken(played) == taken(roll(ALL_HIGH))
    for trajectory in played:
        for turn, step in enumerate(trajectory.steps):
            prefix = transcript(trajectory, turn)
            agreeing = [rung for rung in THREE if greedy_uncached(MODELS[rung], prefix) == step.action]
            assert step.precision == agreeing[-1]
    assert {step.precision for trajectory in played for step in trajectory.steps} == set(THREE)


@torch.no_grad()
def test_the_cascade_acts_high_where_the_low_draft_was_unsure_and_pays_for_the_draft() -> None:
    probabilities = [step.exceedance[0] for t in roll(Confidence(ROUTE, 2.0)) for step in t.steps]
    threshold = (min(probabilities) + max(probabilities)) / 2
    played = roll(Confidence(ROUTE, threshold), slots=3)
    precisions = set()
    for trajectory in played:
        for turn, step in enumerate(trajectory.steps):
            prefix = transcript(trajectory, turn)
            draft = greedy_uncached(LOW, prefix)
            leads = []
            for i in range(len(draft)):
                best = LOW(torch.tensor([prefix + draft[:i]])).logits[0, -1].softmax(-1).sort(descending=True).values
                leads.append(float(best[0] - best[1]))
            high = step.precision == "float"
            assert step.exceedance == pytest.approx((1 - min(leads),), abs=1e-4)
            assert high == (step.exceedance[0] >= threshold)
            assert step.action == (greedy_uncached(HIGH, prefix) if high else draft)
            assert step.besides.keys() == ({"int2"} if high else set())
            for reading in (*step.besides.values(), *([] if high else [step.reading])):
                assert (reading.passes, reading.cached) == (len(draft), passes_over(prefix, draft))
            precisions.add(step.precision)
    assert precisions == set(ROUTE)


def test_the_cascade_of_three_climbs_while_drafts_are_unsure_and_pays_for_each() -> None:
    levels = sorted(step.exceedance[-1] for t in roll(Confidence(THREE, 2.0), route=THREE) for step in t.steps)
    threshold = levels[len(levels) // 2]
    played = roll(Confidence(THREE, threshold), route=THREE, slots=3)
    for trajectory in played:
        for turn, step in enumerate(trajectory.steps):
            prefix, place = transcript(trajectory, turn), THREE.index(step.precision)
            assert step.action == greedy_uncached(MODELS[step.precision], prefix)
            thrown = {rung: len(greedy_uncached(MODELS[rung], prefix)) for rung in THREE[place + 1 :]}
            assert {rung: reading.passes for rung, reading in step.besides.items()} == thrown
            assert [level >= threshold for level in step.exceedance] == [place <= k for k in range(2)]
    assert {step.precision for trajectory in played for step in trajectory.steps} == set(THREE)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_slots(slots: int) -> None:
    assert taken(roll(RandomMixing(HALF, seed=3), slots)) == taken(roll(RandomMixing(HALF, seed=3)))


@pytest.mark.parametrize("action", ["generate", "score"])
def test_what_is_looked_up_is_what_is_computed(action: str) -> None:
    """Everything of an episode, the counts of tokens and passes too, under policies that meet each other's transcripts."""
    policies = [
        ALL_HIGH,
        Disagreement(ROUTE),
        RandomMixing(HALF, seed=3),
        Confidence(ROUTE, 0.9),
        ALL_LOW,
    ]
    known = Known()
    groups = [RolloutRequest(run.task, member) for run in RUNS[:3] for member in range(3)]
    for policy in policies:
        computed = roll(copy.deepcopy(policy), action=action, runs=groups)
        looked_up = roll(copy.deepcopy(policy), slots=4, action=action, runs=groups, known=known)
        assert but_for_rounding(looked_up) == but_for_rounding(computed)
    assert 0.5 < known.share < 1


def test_what_is_known_needs_no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known()
    first = roll(ALL_HIGH, known=known)
    monkeypatch.setattr(Streams, "extend", lambda *_: pytest.fail("a forward pass"))
    assert roll(ALL_HIGH, known=known) == first


def tokens_read(
    monkeypatch: pytest.MonkeyPatch, policy, runs: list[RolloutRequest], agents, known: Known | None = None
) -> tuple[list[Trajectory], int]:
    """What is played, and the tokens of its forward passes."""
    extend, count = Streams.extend, 0

    def counted(self, slots, chunks, counts=None):
        nonlocal count
        count += sum(map(len, chunks))
        return extend(self, slots, chunks, counts)

    with monkeypatch.context() as context:
        context.setattr(Streams, "extend", counted)
        return play(runs, agents, PROMPTER, policy, STEPS, known=known), count


def test_a_transcript_that_another_slot_has_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one of an episode that has ended, nor by how the precisions take turns; costs are as if all had been read."""

    members = [RolloutRequest(RUNS[0].task, member) for member in range(8)]
    mixing, known = RandomMixing(HALF, seed=3), Known()
    alone = [tokens_read(monkeypatch, mixing, [member], streams_of(ROUTE, 1), known) for member in members]
    read_alone = sum(read for _, read in alone)
    for slots in (2, 8):
        played, read = tokens_read(monkeypatch, mixing, members, streams_of(ROUTE, slots), Known())
        assert played == [trajectory for played, _ in alone for trajectory in played]
        assert read < read_alone - len(played[0].steps[0].segment)


def test_streams_may_come_from_other_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they hold already is not read again."""
    agents, policy = streams_of(ROUTE, 7), ALL_HIGH
    first, read = tokens_read(monkeypatch, policy, RUNS, agents)
    again, read_again = tokens_read(monkeypatch, policy, RUNS, agents)
    others, _ = tokens_read(monkeypatch, policy, RUNS[::-1], agents)
    assert first == again == others[::-1]
    assert read - read_again > 0.2 * sum(len(step.segment) - 1 for trajectory in first for step in trajectory.steps)


def test_drawn_actions_are_never_looked_up() -> None:
    known = Known()
    members = [RolloutRequest(RUNS[0].task, member) for member in range(6)]
    drawn_actions = taken(roll(ALL_HIGH, temperature=1.0, runs=members, known=known))
    assert len({str(actions) for actions in drawn_actions}) == 6
    assert not known.actions


def test_drawn_actions_depend_on_the_seed_alone() -> None:
    policy = ALL_HIGH
    first = taken(roll(policy, temperature=1.0, seed=5))
    assert first == taken(roll(policy, slots=2, temperature=1.0, seed=5))
    assert first != taken(roll(policy, temperature=1.0, seed=6))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -2.0, 0.5, -torch.inf], [3.0, -torch.inf, 0.0, 0.0, 7.0]])
    grid = 10_000
    draws = [
        (i + 0.5) / grid for i in range(grid)
    ]  # equal parts of [0, 1): frequencies are probabilities but for 1 / grid
    for row in logits:
        found = torch.bincount(torch.tensor(drawn(row.expand(grid, -1), draws)), minlength=5) / grid
        torch.testing.assert_close(found, torch.distributions.Categorical(logits=row).probs, atol=1.5 / grid, rtol=0)
    assert drawn(logits, [0.0, 0.0]) == [1, 0]  # never what has no probability
    assert drawn(logits, [1 - 2**-53, 1 - 2**-53]) == [3, 4]


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_rows_are_drawn_each_by_its_own_draw(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (4, 50)).astype(np.float32))
    draws = rng.random(4).tolist()
    probabilities = logits.softmax(-1).double().numpy()
    by_hand = [
        next(i for i, level in enumerate(np.cumsum(row)) if level > draw * row.sum())
        for row, draw in zip(probabilities, draws, strict=True)
    ]
    assert drawn(logits, draws) == by_hand


@torch.no_grad()
def test_scoring_takes_the_likeliest_admissible_command() -> None:
    for trajectory in roll(ALL_HIGH, action="score"):
        episode = trajectory.run.task.episode()
        episode.reset()
        for turn, step in enumerate(trajectory.steps):
            prefix, scores = transcript(trajectory, turn), {}
            for command in episode.admissible_commands():
                action = PROMPTER.action(command)
                logits = HIGH(torch.tensor([prefix + action])).logits[0].log_softmax(-1)
                scores[command] = sum(float(logits[len(prefix) - 1 + i, token]) for i, token in enumerate(action))
            assert step.command == max(scores, key=scores.__getitem__)
            episode.step(step.command)


def outgrowing(capacity: int, action="generate") -> list[Trajectory]:
    streams = Streams(HIGH, 3, capacity)
    return play(RUNS, dict.fromkeys(ROUTE, streams), PROMPTER, ALL_HIGH, STEPS, action=action)


def tokens_of(trajectory: Trajectory, turns: int) -> int:
    return sum(len(step.segment) + len(step.action) for step in trajectory.steps[:turns])


@pytest.mark.parametrize("action", ["generate", "score"])
def test_an_episode_that_outgrows_its_transcript_ends_as_lost(action: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = roll(ALL_HIGH, action=action)
    capacity = max(len(trajectory.steps[0].segment) for trajectory in whole) + 60
    cut = outgrowing(capacity, action)
    assert {trajectory.outgrown for trajectory in cut} >= {True}
    for short, long in zip(cut, whole, strict=True):
        turns = len(short.steps)
        assert [step.action for step in short.steps] == [step.action for step in long.steps[:turns]]
        assert 0 < tokens_of(short, turns) <= capacity
        if short.outgrown:
            assert not short.success
            assert short.reward == 0.0
            room = PROMPTER.prompt.max_action_tokens if action == "generate" else 2  # the shortest command and its end
            assert tokens_of(short, turns) + len(long.steps[turns].segment) + room > capacity - 20
        else:
            assert turns == len(long.steps)
    warn_of_outgrown(cut, capacity)
    outgrown = sum(trajectory.outgrown for trajectory in cut)
    assert f"{outgrown} of 7 episodes outgrew the {capacity} tokens of a transcript" in caplog.text
    caplog.clear()
    warn_of_outgrown(whole, 2048)
    assert not caplog.messages


def test_the_last_step_that_fits_is_taken() -> None:
    whole = roll(ALL_HIGH)[:1]
    needed = tokens_of(whole[0], 2) + len(whole[0].steps[2].segment) + PROMPTER.prompt.max_action_tokens
    for capacity, steps in ((needed, 3), (needed - 1, 2)):
        streams = Streams(HIGH, 1, capacity)
        agents = dict.fromkeys(ROUTE, streams)
        assert len(play(RUNS[:1], agents, PROMPTER, ALL_HIGH, 3)[0].steps) == steps


def test_a_first_step_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^task .*: its first step needs \d+ tokens, a transcript may have 20: set agent.max_tr"
    ):
        outgrowing(20)
    with pytest.raises(UserError, match=r"a transcript may have 30"):
        play_alone(HIGH, [RUNS[0].task], PROMPTER, STEPS, 1, max_tokens=30)


def test_the_policy_hears_of_every_segment_and_action() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.heard: dict[str, list[int]] = {}
            self.told: dict[str, list[tuple[list[int], str, list[int]]]] = {}
            self.task_of: dict[int, str] = {}

        def begin(self, slot: int, run: RolloutRequest) -> None:
            self.task_of[slot] = run.task.task_id
            self.heard[run.task.task_id], self.told[run.task.task_id] = [], []

        def decide(self, slots: list[int], segments: list[list[int]], peek: DecisionContext) -> list[Decision]:
            for slot, segment in zip(slots, segments, strict=True):
                self.heard[self.task_of[slot]] += segment
            return [Decision(ROUTE[len(self.told[self.task_of[slot]]) % 2], (0.5,)) for slot in slots]

        def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
            self.heard[self.task_of[slot]] += action
            self.told[self.task_of[slot]].append((segment, precision, action))

    recorder = Recorder()
    for trajectory in roll(recorder, slots=3):
        last = len(trajectory.steps) - 1
        whole = transcript(trajectory, last) + trajectory.steps[last].action
        assert recorder.heard[trajectory.run.task.task_id] == whole
        told = [(step.segment, step.precision, step.action) for step in trajectory.steps]
        assert recorder.told[trajectory.run.task.task_id] == told
        assert [precision for _, precision, _ in told] == [ROUTE[turn % 2] for turn in range(len(told))]


def test_a_rule_decides_before_the_policy_which_hears_of_all_steps() -> None:
    """Whoever decides, the transcript is the policy's to follow; the peek of the policy is of the slots it is asked for."""

    class Watching(Confidence):
        def begin(self, slot: int, run: RolloutRequest) -> None:
            heard.setdefault(run.task.task_id, [])
            task_of[slot] = run.task.task_id

        def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
            heard[task_of[slot]].append((segment, precision, action))

    heard: dict[str, list[tuple[list[int], str, list[int]]]] = {}
    task_of: dict[int, str] = {}

    def even(slots: Sequence[int], peek: DecisionContext) -> list[bool]:
        return [len(commands) % 2 == 0 for commands in peek.admissible_commands(slots)]

    forced = set()
    # At a threshold of 0 no draft is taken.
    for trajectory in roll(Forced(Watching(ROUTE, 0.0), "int2", ROUTE, even), slots=3):
        episode = trajectory.run.task.episode()
        episode.reset()
        for step in trajectory.steps:
            rule = len(episode.admissible_commands()) % 2 == 0
            forced.add(rule)
            assert step.forced == rule
            assert step.precision == ("int2" if rule else "float")
            assert (step.exceedance == (0.0,)) == rule
            assert step.besides.keys() == (set() if rule else {"int2"})
            episode.step(step.command)
        assert heard[trajectory.run.task.task_id] == [(s.segment, s.precision, s.action) for s in trajectory.steps]
    assert forced == {True, False}


def test_processed_tokens_cover_the_transcript_once_for_a_single_precision() -> None:
    for trajectory in roll(ALL_HIGH):
        whole = sum(len(step.segment) + len(step.action) for step in trajectory.steps)
        assert sum(step.reading.tokens for step in trajectory.steps) == whole - 1
