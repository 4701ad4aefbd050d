"""Actions that are looked up in the transcript: the same ones, and what they read is what the passes read that were made."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.precisions import PromptLookup, Speculative
from dmr_pipeline.rollout.cost import a_pass_a_token
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.kv_cache.plain import PlainStreams
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.reading import NOTHING
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.rollout.writing import looked_up
from dmr_pipeline.router.baselines import Disagreement, RandomMixing
from tests.helpers.asking import Asking, Counted
from tests.helpers.one_cache import roll_shared
from tests.helpers.rollouts import HALF, MODELS, PROMPTER, ROUTE, RUNS, STEPS, roll, streams_of, taken

LOOKUP = PromptLookup()
ALONE = SinglePrecision("int2", ROUTE)
CHECKED = SinglePrecision("float", ROUTE, "int2")
POLICIES = [
    ALONE,
    CHECKED,
    RandomMixing(HALF, seed=3),
    Disagreement(ROUTE),
    Asking("states"),
    Asking("states", "draft"),
]
SETTINGS = st.builds(PromptLookup, ngram=st.integers(1, 6), tokens=st.integers(1, 6))


def rolled(policy, slots: int = 7, known: Known | None = None, **more) -> list[Trajectory]:
    more = {"prompt_lookup": LOOKUP, **more}
    return play(RUNS, streams_of(ROUTE, slots), PROMPTER, policy, STEPS, known=known, **more)


@given(st.lists(st.integers(0, 3), max_size=30), SETTINGS)
def test_what_is_looked_up_is_what_transformers_finds(text: list[int], settings: PromptLookup) -> None:
    """It takes the first place, ours is the last one: in the text from there on they find the same."""
    found = looked_up(text, settings)
    if not found:
        assert not any(token in text[:-1] for token in text[-1:])
        return
    size = max(n for n in range(1, settings.ngram + 1) if text[-n:] in [text[i : i + n] for i in range(len(text) - n)])
    last = max(i for i in range(len(text) - size) if text[i : i + size] == text[-size:])
    theirs = PromptLookupCandidateGenerator(
        num_output_tokens=settings.tokens, max_matching_ngram_size=size, max_length=1000
    )
    given_text = text[last:]
    candidates, _ = theirs.get_candidates(torch.tensor([given_text]))
    assert [*given_text, *found] == candidates[0].tolist()


def test_by_hand() -> None:
    assert looked_up([5, 6, 7, 1, 6, 8, 2, 5, 6], PromptLookup(ngram=2, tokens=3)) == [7, 1, 6]
    assert looked_up([5, 6, 7, 1, 6, 8, 2, 5, 6], PromptLookup(ngram=1, tokens=2)) == [8, 2]
    assert looked_up([1, 2, 3], LOOKUP) == looked_up([], LOOKUP) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_actions_are_the_same_in_fewer_passes_whatever_else_is_played(policy) -> None:
    looked, plain = rolled(policy), roll(policy)
    assert looked == rolled(policy, slots=2) == rolled(policy, known=Known())
    assert taken(looked) == taken(plain)
    passes = [
        sum(reading.passes for trajectory in played for step in trajectory.steps for _, reading in step.readings)
        for played in (looked, plain)
    ]
    assert passes[0] < 0.95 * passes[1]


@pytest.mark.parametrize("asked", [(), ("states",), ("draft",), ("states", "draft")])
@pytest.mark.parametrize("drafts", [Speculative(), Speculative(draft_tokens=2), Speculative(stop_margin=0.5)])
def test_an_episode_costs_what_its_passes_read(asked: tuple[str, ...], drafts: Speculative) -> None:
    for run in RUNS[:3]:
        agents = {rung: Counted(MODELS[rung], 1, 2048) for rung in ROUTE}
        (trajectory,) = play(
            [run], agents, PROMPTER, Asking(*asked), STEPS, speculative=drafts, prompt_lookup=PromptLookup(ngram=2)
        )
        counted = dict.fromkeys(agents, NOTHING)
        for step in trajectory.steps:
            for rung, reading in step.readings:
                counted[rung] += reading
        assert counted == {rung: streams.reading for rung, streams in agents.items()}


def test_one_cache_of_all_looks_up_too() -> None:
    for policy in (CHECKED, RandomMixing(HALF, seed=3), Asking("states")):
        played = [
            roll_shared(policy, slots, prompt_lookup=its) for slots, its in itertools.product((7, 2), (LOOKUP, None))
        ]
        assert played[0] == played[2]
        assert taken(played[0]) == taken(played[1])


def test_drawn_actions_are_the_same_too() -> None:
    """Each token is drawn by the place where it stands, whatever was guessed."""
    assert taken(rolled(ALONE, temperature=1.0, seed=5)) == taken(roll(ALONE, temperature=1.0, seed=5))


def test_the_unit_of_cost_is_an_episode_at_a_pass_a_token() -> None:
    looked, plain = rolled(ALONE), roll(ALONE)
    assert [a_pass_a_token(trajectory) for trajectory in looked] == plain
    assert [a_pass_a_token(trajectory) for trajectory in plain] == plain


def test_where_it_cannot_be_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"precisions.prompt_lookup: with agent.action: score nothing is written"):
        rolled(ALONE, action="score")
    agents = {**streams_of(ROUTE, 7), "int2": PlainStreams(MODELS["int2"], 7, 2048)}
    with pytest.raises(UserError, match=r"precisions.prompt_lookup: the cache of 'int2' cannot be cut"):
        play(RUNS, agents, PROMPTER, ALONE, STEPS, prompt_lookup=LOOKUP)
