"""Drafted by one precision, checked by another: the actions are those of the one that checks."""

import copy
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.precisions import Speculative
from dmr_pipeline.rollout.choosing import checked, seeded_generator
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.kv_cache.catching_up import catch_up
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.kv_cache.plain import PlainStreams
from dmr_pipeline.rollout.policy import Decision, SinglePrecision
from dmr_pipeline.rollout.reading import NOTHING, Reading, Round, checking, drafting, one_by_one
from dmr_pipeline.rollout.speculation import Checked, write_checked
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.rollout.writing import NgramGuesses
from tests.helpers.asking import Asking, Counted
from tests.helpers.causal_lms import uncached
from tests.helpers.kinds import model_of
from tests.helpers.one_cache import roll_shared
from tests.helpers.rollouts import (
    LOW,
    MODELS,
    PROMPTER,
    RUNS,
    STEPS,
    THREE,
    greedy_uncached,
    passes_over,
    roll,
    rollouts_of,
    streams_of,
    taken,
    transcript,
)

PAIRS = list(itertools.combinations(THREE, 2))
"""Who checks, who drafts."""
WHOLE = Speculative()
DRAFTS = st.builds(
    Speculative, draft_tokens=st.none() | st.integers(1, 5), stop_margin=st.sampled_from([0.0, 0.1, 1.0])
)
TOKENS = st.lists(st.integers(0, len(PROMPTER.tokenizer) - 1), min_size=1, max_size=12)


def no_guesses(waiting: Mapping[int, list[int]]) -> dict[int, list[int]]:
    return {i: [] for i in waiting}


def check(
    dear, cheap, slots: Sequence[int], texts: Sequence[list[int]], drafts=WHOLE, guess=no_guesses
) -> list[Checked]:
    """Greedy actions of the dear streams."""
    unread = [catch_up(streams, slots, texts) for streams in (dear, cheap)]
    return write_checked(
        dear, cheap, slots, texts, *unread, {}, guess, PROMPTER.is_complete, drafts, 0.0, lambda *_: 0.0
    )


@given(st.sampled_from(PAIRS), st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=3), DRAFTS)
@settings(max_examples=25, deadline=None)
def test_actions_are_those_of_the_precision_that_checks_and_caches_stay_exact(
    pair: tuple[str, str], parts: list[tuple[list[int], list[int]]], drafts: Speculative
) -> None:
    dear, cheap = (Streams(MODELS[rung], len(parts), 2048) for rung in pair)
    guesses, slots, texts = NgramGuesses(), range(len(parts)), [list(first) for first, _ in parts]

    def guess(waiting: Mapping[int, list[int]]) -> dict[int, list[int]]:
        return {i: guesses.guess(texts[i], written, 5) for i, written in waiting.items()}

    for turn in range(2):  # the second from what the first has left in the streams
        actions = check(dear, cheap, slots, texts, drafts, guess)
        for text, action, (_, more) in zip(texts, actions, parts, strict=True):
            assert action.tokens == greedy_uncached(MODELS[pair[0]], text)
            guesses.learn(text, action.tokens)
            text += action.tokens + more[: 1 + turn]
    for rung, streams in zip(pair, (dear, cheap), strict=True):
        for text, logits in zip(texts, streams.extend(slots, catch_up(streams, slots, texts)), strict=True):
            torch.testing.assert_close(logits, uncached(MODELS[rung], text)[-1], atol=1e-3, rtol=1e-3)


@given(st.sampled_from(PAIRS), TOKENS, DRAFTS)
@settings(max_examples=60, deadline=None)
def test_what_is_counted_is_what_passes_over_one_sequence_read(
    pair: tuple[str, str], text: list[int], drafts: Speculative
) -> None:
    dear, cheap = (Counted(MODELS[rung], 1, 2048) for rung in pair)
    (action,) = check(dear, cheap, [0], [text], drafts)
    grown = Reading(tokens=len(text))
    assert grown + checking(len(text), action.rounds) == dear.reading
    assert grown + drafting(action.rounds) == cheap.reading
    assert cheap.lengths[0] >= len(text) + action.rounds[-1].kept
    assert (
        cheap.texts[0][: len(text) + action.rounds[-1].kept]
        == (text + action.tokens)[: len(text) + action.rounds[-1].kept]
    )


def test_readings_by_hand() -> None:
    """Ten tokens are held. Three are drafted, one is right; then four, the last of which would end the action, all right."""
    rounds = [Round(0, 3, 3, 1, one_by_one(10, 3)), Round(2, 4, 3, 4, one_by_one(12, 4))]
    assert checking(10, rounds) == Reading(2, 3 + (1 + 3), 13 + 15)
    # passes over 10, 11, 12, and, cut back to 11, over 12, 13, 14, 15: one token each but for the first pass's transcript
    assert drafting(rounds) == Reading(7, 2 + 4, 10 + 11 + 12 + 12 + 13 + 14 + 15)
    # Where all of a draft was right, the drafter has not read its last token either.
    all_right = [Round(0, 2, 2, 2, one_by_one(10, 2)), Round(3, 1, 0, 1, one_by_one(13, 1))]
    assert drafting(all_right) == Reading(3, 1 + 2, 10 + 11 + 13)


def test_drafts_end_where_the_recipe_says() -> None:
    dear, cheap = (Streams(MODELS[rung], 1, 2048) for rung in ("float", "int2"))
    texts = [RUNS_TEXT]
    whole, short, unsure = (
        check(dear, cheap, [0], texts, drafts)[0].rounds
        for drafts in (WHOLE, Speculative(draft_tokens=2), Speculative(stop_margin=1.0))
    )
    assert whole[0].drafted == len(greedy_uncached(LOW, RUNS_TEXT)) > 2
    assert max(r.drafted for r in short) == 2
    assert {r.drafted for r in unsure} == {1}  # no token leads by all there is
    assert len(whole) <= len(short) <= len(unsure)


RUNS_TEXT = transcript(roll(SinglePrecision("float"))[0], 2)


@pytest.mark.parametrize(("dear", "cheap"), PAIRS)
@pytest.mark.parametrize("drafts", [None, Speculative(draft_tokens=3, stop_margin=0.05)])
def test_episodes_are_those_of_the_precision_that_checks(dear: str, cheap: str, drafts: Speculative | None) -> None:
    written = roll(SinglePrecision(dear, THREE), route=THREE)
    played = [
        play(RUNS, streams_of(THREE, slots), PROMPTER, SinglePrecision(dear, THREE, cheap), STEPS, speculative=drafts)
        for slots in (7, 2)
    ]
    assert played[0] == played[1]
    assert taken(played[0]) == taken(written)
    steps = [step for trajectory in played[0] for step in trajectory.steps]
    assert {step.precision for step in steps} == {dear}
    assert all(step.besides.keys() == {cheap} and 0 <= step.accepted <= step.drafted for step in steps)
    assert sum(step.reading.passes for step in steps) < sum(len(step.action) for step in steps)
    assert 0.3 < sum(step.accepted for step in steps) / sum(step.drafted for step in steps) < 1


@pytest.mark.parametrize("asked", [("states",), ("draft",), ("states", "draft")])
def test_mixed_with_other_steps_and_questions_all_is_exact(asked: tuple[str, ...]) -> None:
    def drafts(played: list[Trajectory]) -> list[tuple[int, int]]:
        return [(step.drafted, step.accepted) for trajectory in played for step in trajectory.steps]

    asking_nothing = drafts(roll(Asking(), route=("float", "int2")))
    for slots in (7, 2):
        played = roll(Asking(*asked), slots, route=("float", "int2"))
        assert drafts(played) == asking_nothing
        for trajectory in played:
            for turn, step in enumerate(trajectory.steps):
                assert step.precision == ("float" if turn % 2 else "int2")
                assert step.action == greedy_uncached(MODELS[step.precision], transcript(trajectory, turn))


@pytest.mark.parametrize("asked", [(), ("states",), ("draft",)])
def test_an_episode_costs_what_its_passes_read(asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NgramGuesses, "guess", lambda *_: [])
    agents = {rung: Counted(MODELS[rung], 1, 2048) for rung in ("float", "int2")}
    for trajectory in play(RUNS[:1], agents, PROMPTER, Asking(*asked), STEPS):
        counted = dict.fromkeys(agents, NOTHING)
        for step in trajectory.steps:
            for rung, reading in ((step.precision, step.reading), *step.besides.items()):
                counted[rung] += reading
        assert counted == {rung: streams.reading for rung, streams in agents.items()}
        assert any(step.accepted < step.drafted for step in trajectory.steps)


def test_checked_actions_are_looked_up_as_what_they_are() -> None:
    known, pair = Known(), ("float", "int2")
    written = roll(SinglePrecision("float", pair), known=known)
    for drafter in ("int2", "int4"):
        policy = SinglePrecision("float", THREE, drafter)
        computed = roll(policy, route=THREE)
        assert roll(policy, route=THREE, known=known) == computed
        before = known.looked_up
        assert roll(policy, slots=2, route=THREE, known=known) == computed
        assert known.looked_up - before == sum(len(trajectory.steps) for trajectory in computed)
    assert roll(SinglePrecision("float", pair), known=known) == written
    assert {drafter for _, drafter, _ in known.actions} == {None, "int2", "int4"}


@pytest.mark.parametrize("roll_with", [roll, roll_shared])
@pytest.mark.parametrize("known", [None, Known()])
def test_a_draft_that_was_asked_for_is_what_is_checked_and_is_paid_once(roll_with, known: Known | None) -> None:
    class First(SinglePrecision):
        def decide(self, slots, segments, peek) -> list[Decision]:
            peek.drafts("int2", slots)
            return super().decide(slots, segments, peek)

    asked = roll_with(First("float", THREE, "int2"), route=THREE, known=known)
    assert asked == roll_with(SinglePrecision("float", THREE, "int2"), route=THREE)
    assert any(step.accepted < step.drafted for trajectory in asked for step in trajectory.steps)


def test_drawn_episodes_depend_on_the_seed_alone() -> None:
    policy = SinglePrecision("float", THREE, "int2")
    first = roll(policy, temperature=1.0, seed=5, route=THREE)
    assert first == roll(policy, slots=2, temperature=1.0, seed=5, route=THREE)
    assert taken(first) != taken(roll(policy, temperature=1.0, seed=6, route=THREE))


def test_what_cannot_be_checked_is_refused() -> None:
    policy, agents = SinglePrecision("float", THREE, "int2"), streams_of(THREE, 7)
    with pytest.raises(UserError, match=r"'int2' is to draft for 'float', but with agent.action: score"):
        roll(policy, action="score", route=THREE)
    with pytest.raises(ValueError, match="'float' cannot draft for 'int2': it is not cheaper"):
        roll(SinglePrecision("int2", THREE, "float"), route=THREE)
    for rung in ("float", "int2"):
        plain = {**agents, rung: PlainStreams(MODELS[rung], 7, 2048)}
        with pytest.raises(UserError, match=f"the cache of '{rung}' cannot be cut"):
            play(RUNS, plain, PROMPTER, policy, STEPS)
    rollouts = rollouts_of(("float", "int2"))
    slow = replace(rollouts.acting, models={**rollouts.acting.models, "int2": model_of("bloom")})
    assert rollouts.can_draft
    assert not replace(rollouts, action="score").can_draft
    assert not replace(rollouts, acting=slow).can_draft


FEW = 5
LENGTH = 3


def few_words(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=FEW, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("draft_tokens", [None, 1, 2])
def test_drawn_actions_follow_the_distribution_of_the_precision_that_checks(draft_tokens: int | None) -> None:
    """All strings of three tokens of a vocabulary of five, against their exact probabilities; and the share of first tokens that
    are taken against sum(min(p, q))."""
    models, text, slots, temperature = [few_words(1), few_words(2)], [1, 2, 3], 400, 0.7
    found: list[Checked] = []
    for batch in range(10):
        dear, cheap = (PackedStreams(model, slots, 16) for model in models)
        found += write_checked(
            dear, cheap, range(slots), [text] * slots, [text] * slots, [text] * slots, {}, no_guesses,
            lambda tokens: len(tokens) == LENGTH, Speculative(draft_tokens=draft_tokens), temperature,
            lambda i, *key, batch=batch: seeded_generator("test", batch, i, *key).random(),
        )  # fmt: skip

    def after(model: LlamaForCausalLM, tokens: Sequence[int]) -> Tensor:
        return (uncached(model, [*text, *tokens])[-1].double() / temperature).softmax(-1)

    strings = list(itertools.product(range(FEW), repeat=LENGTH))
    exact = np.array([np.prod([float(after(models[0], s[:n])[s[n]]) for n in range(LENGTH)]) for s in strings])
    counts = Counter(tuple(action.tokens) for action in found)
    observed = np.array([counts[s] for s in strings])
    rare = exact * len(found) < 5
    pooled = [np.append(values[~rare], values[rare].sum()) for values in (observed, exact * len(found))]
    assert chisquare(*pooled).pvalue > 1e-3
    likely = float(torch.minimum(after(models[0], []), after(models[1], [])).sum())
    assert 0.3 < likely < 0.9
    accepted = np.mean([action.rounds[0].agreed > 0 for action in found])
    assert abs(accepted - likely) < 4 * (likely * (1 - likely) / len(found)) ** 0.5


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_checked_draft_has_the_probabilities_of_who_checks(seed: int) -> None:
    """Over all drafts, as often as they are drawn, and a grid of draws."""
    generator, n, grid = torch.Generator().manual_seed(seed), 6, 60
    logits, draft_logits = torch.randn(2, n, generator=generator) * 2
    logits[seed % n] = -torch.inf
    q = draft_logits.double().softmax(-1)
    draws = [((i + 0.5) / grid, (j + 0.5) / grid) for i in range(grid) for j in range(grid)]
    total = torch.zeros(n, dtype=torch.double)
    for x in range(n):
        rows = len(draws)
        chosen = checked(logits.expand(rows, -1), draft_logits.expand(rows, -1), [x] * rows, draws)
        total += q[x] * torch.bincount(torch.tensor(chosen), minlength=n) / rows
    torch.testing.assert_close(total, logits.double().softmax(-1), atol=1.5 / grid, rtol=0)
    same = checked(logits[None], logits[None], [(seed + 1) % n], [(1 - 2**-53, 0.5)])
    assert same == [(seed + 1) % n]  # equal distributions take every draft


def test_a_step_is_paid_for_in_both_precisions() -> None:
    """Where the draft is right in full: one pass that reads it, and as many of the drafter as it has tokens."""
    model = {"float": MODELS["float"], "int2": copy.deepcopy(MODELS["float"])}
    agents = {rung: Streams(its, 7, 2048) for rung, its in model.items()}
    for trajectory in play(RUNS, agents, PROMPTER, SinglePrecision("float", (), "int2"), STEPS):
        for turn, step in enumerate(trajectory.steps):
            held, count = transcript(trajectory, turn), len(step.action)
            assert (step.reading.passes, step.reading.cached) == (1, len(held) + count - 1)
            drafter = step.besides["int2"]
            assert (drafter.passes, drafter.cached) == (count, passes_over(held, step.action))
            assert (step.drafted, step.accepted) == (count, count)
            assert drafter.tokens == step.reading.tokens == len(step.segment) + count - (turn == 0)
