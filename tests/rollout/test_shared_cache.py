"""One cache for all precisions, against plain transformers whose models take turns at a `DynamicCache`."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.precisions import Speculative
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.known import Known, Transcript
from dmr_pipeline.rollout.kv_cache.choice import shared_streams, token_streams
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.kv_cache.shared import SharedStreams
from dmr_pipeline.rollout.policy import Decision, SinglePrecision
from dmr_pipeline.rollout.reading import NOTHING, Reading
from dmr_pipeline.rollout.speculation import write_checked
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.rollout.writing import NgramGuesses
from dmr_pipeline.router.baselines import Confidence, Disagreement, RandomMixing
from tests.helpers.asking import Asking
from tests.helpers.causal_lms import SHAPE, VOCABULARY, assert_close, causal_lm
from tests.helpers.kinds import model_of
from tests.helpers.one_cache import OneCache, roll_shared
from tests.helpers.rollouts import (
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
    roll,
    taken,
    transcript,
)

KINDS = [Streams, PackedStreams]
SLOTS = 3


def other_weights(seed: int):
    model = causal_lm(Qwen3Config(**SHAPE, tie_word_embeddings=True))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


RUNGS = {rung: other_weights(seed) for seed, rung in enumerate(THREE)}
slot = st.integers(0, SLOTS - 1)
TOKENS = st.lists(st.integers(0, len(PROMPTER.tokenizer) - 1), min_size=1, max_size=9)
few_words = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(THREE),
            st.dictionaries(slot, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1),
            st.floats(0, 1),
        ),
        min_size=2,
        max_size=8,
    )
)
def test_models_in_turn_go_on_from_each_others_keys_and_values(kind: type, turns: list) -> None:
    streams = SharedStreams(kind, RUNGS, SLOTS, 100)
    plain = [OneCache(RUNGS["float"]) for _ in range(SLOTS)]
    for rung, chunks, share in turns:
        counts = [len(chunk) for chunk in chunks.values()]
        found = streams[rung].extend(list(chunks), list(chunks.values()), counts)
        for (at, chunk), rows in zip(chunks.items(), found.split(counts), strict=True):
            assert_close(rows, plain[at].read(RUNGS[rung], chunk))
        cut = next(iter(chunks))
        plain[cut].cut(int(share * len(plain[cut].tokens)) + 1)
        streams["int4"].truncate(cut, len(plain[cut].tokens))
        assert [streams[other].texts for other in THREE] == [[cache.tokens for cache in plain]] * 3


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.tuples(st.sampled_from(THREE), few_words), max_size=3), min_size=SLOTS, max_size=SLOTS),
    st.dictionaries(slot, st.tuples(few_words, st.lists(st.integers(0, 2), max_size=12)), min_size=1),
    st.sampled_from(THREE),
)
def test_a_lagging_text_is_read_as_its_trail_says(kind: type, held: list, wanted: dict, rung: str) -> None:
    """Whatever the slots hold: what of it is as the trail says is kept or copied, the rest is read by whom it names."""
    streams = SharedStreams(kind, RUNGS, SLOTS, 100)
    for at, parts in enumerate(held):
        for reader, chunk in parts:
            streams[reader].extend([at], [chunk])
    trails = {at: bytes(trail[: len(text)]) for at, (text, trail) in wanted.items()}
    texts = {at: text for at, (text, _) in wanted.items()}
    left = streams.catch_up(rung, list(texts), list(texts.values()), list(trails.values()))
    found = streams[rung].extend(list(texts), left)
    for (at, text), logits in zip(texts.items(), found, strict=True):
        plain, trail = OneCache(RUNGS["float"]), trails[at][: len(text) - 1]
        for token, reader in zip(text, trail, strict=False):
            plain.read(RUNGS[THREE[reader]], [token])
        assert_close(logits, plain.see(RUNGS[rung], text))
        own = bytes([THREE.index(rung)])
        assert streams[rung].texts[at] == text
        assert streams[rung].readers[at] == trail + own * (len(text) - len(trail))


def test_what_any_slot_has_read_alike_is_copied() -> None:
    streams = SharedStreams(PackedStreams, RUNGS, SLOTS, 100)
    text = [1, 2, 3, 4, 5, 6]
    streams["float"].extend([0], [text[:3]])
    streams["int2"].extend([0], [text[3:]])
    float_, int2 = bytes([0]), bytes([2])
    assert streams.catch_up("int2", [1], [text], [float_ * 3]) == [text[5:]]
    assert streams["float"].readers[1] == float_ * 3 + int2 * 2
    assert streams.catch_up("float", [2], [text], [float_ * 3]) == [text[3:]]  # the rest is int2's
    assert streams.catch_up("float", [2], [text], [b""]) == [text[3:]]
    assert streams.catch_up("int2", [2], [text], [b""]) == [text]


MIXING = RandomMixing(dict.fromkeys(THREE, 1 / 3), seed=3)


class InTurn(Asking):
    """The precisions in turn, a checked step among them."""

    def decided(self, slot: int) -> Decision:
        drafter = [None, None, "int2"][self.turns[slot] % 3]
        return Decision(["int2", "float", "float"][self.turns[slot] % 3], (), drafter=drafter)


def assert_acts(played: list[Trajectory], act) -> None:
    """`act(cache, step, transcript)` gives each step's action, by plain transformers; more than one precision acts."""
    for trajectory in played:
        cache = OneCache()
        for turn, step in enumerate(trajectory.steps):
            assert act(cache, step, transcript(trajectory, turn)) == step.action
    assert len({step.precision for trajectory in played for step in trajectory.steps}) > 1


def differ(played: list[Trajectory], policy, route) -> bool:
    """Whether one cache makes a difference at all."""
    return taken(played) != taken(roll(copy.deepcopy(policy), route=route))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", [ROUTE, THREE])
@given(st.integers(0, 1000), st.sets(st.integers(0, len(RUNS) - 1), min_size=3, max_size=3))
@settings(max_examples=4, deadline=None)
def test_mixed_episodes_are_those_of_models_that_take_turns_at_a_cache(
    kind: type, route: tuple[str, ...], seed: int, games: set[int]
) -> None:
    policy = RandomMixing(dict.fromkeys(route, 1 / len(route)), seed)
    played = roll_shared(policy, slots=2, route=route, kind=kind, runs=[RUNS[game] for game in games])
    assert_acts(played, lambda cache, step, text: cache.act(MODELS[step.precision], text))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(list(itertools.combinations(THREE, 2))),
    st.lists(
        st.tuples(st.lists(st.tuples(st.sampled_from(THREE), TOKENS), max_size=3), TOKENS), min_size=1, max_size=3
    ),
    st.builds(Speculative, draft_tokens=st.none() | st.integers(1, 5), stop_margin=st.sampled_from([0.0, 0.1, 1.0])),
)
def test_a_checked_action_and_its_cache_are_those_of_who_checks(
    kind: type, pair: tuple[str, str], parts: list, drafts: Speculative
) -> None:
    """Whoever has read what is before."""
    streams, slots = SharedStreams(kind, MODELS, len(parts), 2048), range(len(parts))
    plain = [OneCache() for _ in slots]
    for at, (begun, _) in enumerate(parts):
        for rung, tokens in begun:
            streams[rung].extend([at], [tokens])
            plain[at].read(MODELS[rung], tokens)
    dear, cheap = (streams[rung] for rung in pair)
    readers, unread = [bytes(its) for its in dear.readers], [new for _, new in parts]
    texts = [cache.tokens + new for cache, new in zip(plain, unread, strict=True)]
    actions = write_checked(
        dear, cheap, slots, texts, unread, unread, {}, lambda waiting: {i: [] for i in waiting}, PROMPTER.is_complete,
        drafts, 0.0, lambda *_: 0.0, shared=True,
    )  # fmt: skip
    for at, (text, action) in enumerate(zip(texts, actions, strict=True)):
        assert action.tokens == plain[at].act(MODELS[pair[0]], text)
        assert dear.texts[at] == plain[at].tokens == text + action.tokens[:-1]
        own = bytes([dear.reader]) * (len(unread[at]) + len(action.tokens) - 1)
        assert dear.readers[at] == readers[at] + own
    more = [[1, 2]] * len(parts)
    for rows, cache in zip(cheap.extend(slots, more), plain, strict=True):
        torch.testing.assert_close(rows, cache.read(MODELS[pair[1]], [1, 2])[-1], atol=1e-3, rtol=1e-3)


def test_one_cache_makes_a_difference() -> None:
    for route in (ROUTE, THREE):
        policy = RandomMixing(dict.fromkeys(route, 1 / len(route)), seed=3)
        assert differ(roll_shared(policy, route=route), policy, route)


def test_drafts_that_are_thrown_away_leave_the_transcript_as_they_have_read_it() -> None:
    levels = sorted(step.exceedance[-1] for t in roll_shared(Confidence(THREE, 2.0), route=THREE) for step in t.steps)
    policy = Confidence(THREE, levels[len(levels) // 2])
    played = roll_shared(policy, route=THREE)

    def act(cache: OneCache, step, text: list[int]) -> list[int]:
        for rung in THREE[: THREE.index(step.precision) : -1]:
            cache.act(MODELS[rung], text)
        return cache.act(MODELS[step.precision], text)

    assert_acts(played, act)
    assert differ(played, policy, THREE)


@pytest.mark.parametrize("asked", [(), ("states",), ("draft",), ("states", "draft")])
@pytest.mark.parametrize("slots", [7, 2])
def test_what_was_asked_for_is_gone_on_from_but_for_a_check(asked: tuple[str, ...], slots: int) -> None:
    def act(cache: OneCache, step, text: list[int]) -> list[int]:
        if asked and not step.drafted:  # a check is by what the step began with
            cache.see(LOW, text)
        return cache.act(MODELS[step.precision], text)

    played = roll_shared(InTurn(*asked), slots)
    assert_acts(played, act)
    assert any(step.drafted for trajectory in played for step in trajectory.steps)
    assert differ(played, InTurn(*asked), ROUTE)


@pytest.mark.parametrize("asked", [("dear",), ("states", "dear"), ("draft", "dear")])
def test_who_acts_reads_the_last_token_again_where_another_has(asked: tuple[str, ...]) -> None:
    def act(cache: OneCache, step, text: list[int]) -> list[int]:
        if "states" in asked:
            cache.see(LOW, text)
        draft = cache.act(LOW, text) if "draft" in asked else []
        dear = cache.act(HIGH, text)
        if step.precision == "float":
            return dear
        cache.cut(len(text))  # what is written there is not what is done
        return draft or cache.act(LOW, text)

    played = roll_shared(InTurn(*asked), 3)
    assert_acts(played, act)
    assert differ(played, InTurn(*asked), ROUTE)


@pytest.mark.parametrize("drafts", [None, Speculative(draft_tokens=2), Speculative(stop_margin=0.1)])
@pytest.mark.parametrize("dear", ["float", "int4"])
def test_checked_actions_are_those_that_are_written(dear: str, drafts: Speculative | None) -> None:
    """One precision that only checks does what it does alone, with a cache of its own."""
    played = roll_shared(SinglePrecision(dear, THREE, "int2"), route=THREE, speculative=drafts)
    assert taken(played) == taken(roll(SinglePrecision(dear, THREE), route=THREE))
    steps = [step for trajectory in played for step in trajectory.steps]
    assert 0 < sum(step.accepted for step in steps) < sum(step.drafted for step in steps)


def test_an_oracle_leaves_no_trace() -> None:
    policy = Disagreement(ROUTE)
    played = roll_shared(policy)
    for trajectory in played:
        cache = OneCache()
        for turn, step in enumerate(trajectory.steps):
            text, before = transcript(trajectory, turn), len(cache.tokens)
            agree = cache.act(LOW, text) == cache.act(HIGH, text)
            assert step.precision == ROUTE[agree]
            cache.cut(before)
            assert cache.act(MODELS[step.precision], text) == step.action
            assert not step.besides
    assert 0 < sum(trajectory.share("float") for trajectory in played) < len(played)


@torch.no_grad()
def test_scoring_takes_the_likeliest_command_by_the_one_cache() -> None:
    played = roll_shared(RandomMixing(HALF, seed=3), action="score")
    for trajectory in played:
        episode, cache = trajectory.run.task.episode(), OneCache()
        episode.reset()
        for turn, step in enumerate(trajectory.steps):
            text, model, scores = transcript(trajectory, turn), MODELS[step.precision], {}
            first = cache.see(model, text)[None]
            for command in episode.admissible_commands():
                action = PROMPTER.action(command)
                rows = torch.cat([first, cache.read(model, action[:-1])]).log_softmax(-1)
                scores[command] = sum(float(row[token]) for row, token in zip(rows, action, strict=True))
                cache.cut(len(text))
            assert step.command == max(scores, key=scores.__getitem__)
            episode.step(step.command)


POLICIES = [
    SinglePrecision("float", ROUTE),
    RandomMixing(HALF, seed=3),
    Confidence(ROUTE, 0.9),
    Disagreement(ROUTE),
    SinglePrecision("float", ROUTE, "int2"),
    InTurn("states"),
    InTurn("draft"),
    InTurn("states", "draft"),
    InTurn("states", "dear"),
    InTurn("draft", "dear"),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_with_equal_weights_one_cache_does_what_several_do(policy, temperature: float) -> None:
    same = {"float": HIGH, "int2": copy.deepcopy(HIGH)}
    agents = {rung: PackedStreams(model, 7, 2048) for rung, model in same.items()}
    written = play(RUNS, agents, PROMPTER, copy.deepcopy(policy), STEPS, temperature=temperature, seed=5)
    for known in (None, Known()):
        played = roll_shared(copy.deepcopy(policy), temperature=temperature, seed=5, models=same, known=known)
        assert taken(played) == taken(written)
        for one, several in zip(but_for_rounding(played), but_for_rounding(written), strict=True):
            for a, b in zip(one.steps, several.steps, strict=True):
                assert (a.precision, a.exceedance, a.drafted) == (b.precision, b.exceedance, b.drafted)
                assert (a.reading.passes, a.reading.cached) == (b.reading.passes, b.reading.cached)
                assert a.reading.tokens <= b.reading.tokens


@pytest.mark.parametrize("action", ["generate", "score"])
def test_of_one_rung_there_is_no_difference(action: str) -> None:
    policy = SinglePrecision("int2")
    assert roll_shared(policy, route=("int2",), action=action, kind=Streams) == roll(
        policy, route=("int2",), action=action
    )


@pytest.mark.parametrize("policy", [*POLICIES, MIXING], ids=lambda policy: type(policy).__name__)
def test_neither_slots_nor_look_ups_change_an_episode(policy) -> None:
    """Everything of it, what was read too."""
    route = THREE if policy is MIXING else ROUTE
    groups = [RolloutRequest(run.task, member) for run in RUNS[:3] for member in range(2)]
    computed = roll_shared(copy.deepcopy(policy), runs=groups, route=route)
    known = Known()
    for other in (RandomMixing(dict.fromkeys(route, 1 / len(route)), seed=4), policy, policy):
        looked_up = roll_shared(copy.deepcopy(other), slots=2, runs=groups, route=route, known=known)
    assert but_for_rounding(looked_up) == but_for_rounding(computed)
    assert known.share > 0.4
    for slots in (1, 4):
        assert but_for_rounding(
            roll_shared(copy.deepcopy(policy), slots, runs=groups, route=route)
        ) == but_for_rounding(computed)


def test_what_was_read_by_others_is_not_looked_up() -> None:
    """The same transcript, read by int2 in one episode and by float in the other: what float does next is not the same."""

    class Then(SinglePrecision):
        def begin(self, slot, run) -> None:
            turns[slot] = 0

        def decide(self, slots, segments, peek) -> list[Decision]:
            return [Decision("float" if turns[slot] else self.precision, ()) for slot in slots]

        def acted(self, slot, segment, precision, action) -> None:
            turns[slot] += 1

    known, turns = Known(), Counter[int]()
    played = [roll_shared(Then(precision), known=known) for precision in ROUTE]
    alike = [pair for pair in zip(*played, strict=True) if pair[0].steps[0].action == pair[1].steps[0].action]
    assert alike
    for one, other in alike:
        second = Transcript()
        second.append(transcript(one, 1))
        assert transcript(one, 1) == transcript(other, 1)
        places = [place for rung, _, place in known.actions if rung == "float" and place.startswith(second.digest())]
        assert len(places) == 2
        assert len({known.actions["float", None, place].margin for place in places}) == 2


class Counted(PackedStreams):
    """Counts what its forward passes read, of all slots."""

    reading = NOTHING

    def _forward(self, slots, chunks, wanted, layers=()):
        for at, chunk in zip(slots, chunks, strict=True):
            self.reading += Reading(1, len(chunk), len(self.texts[at]) + len(chunk))
        return super()._forward(slots, chunks, wanted, layers)


@pytest.mark.parametrize("drafts", [None, Speculative(draft_tokens=2)])
@pytest.mark.parametrize(
    "policy", [p for p in POLICIES if not isinstance(p, Disagreement)], ids=lambda policy: type(policy).__name__
)
def test_an_episode_costs_what_its_passes_read(
    policy, drafts: Speculative | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NgramGuesses, "guess", lambda *_: [])
    agents = SharedStreams(Counted, {rung: MODELS[rung] for rung in ROUTE}, 1, 2048)
    for trajectory in play(RUNS[:1], agents, PROMPTER, copy.deepcopy(policy), STEPS, speculative=drafts):
        counted = dict.fromkeys(ROUTE, NOTHING)
        for step in trajectory.steps:
            for rung, reading in ((step.precision, step.reading), *step.besides.items()):
                counted[rung] += reading
        assert counted == {rung: agents[rung].reading for rung in ROUTE}


def test_mixed_episodes_are_read_once() -> None:
    for trajectory in roll_shared(RandomMixing(HALF, seed=3)):
        whole = sum(len(step.segment) + len(step.action) for step in trajectory.steps)
        assert sum(step.reading.tokens for step in trajectory.steps) == whole - 1
        for turn, step in enumerate(trajectory.steps):
            before = trajectory.steps[turn - 1].action[-1:] if turn else []
            assert step.reading.tokens == len(before + step.segment + step.action[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_one_cache_takes_the_memory_of_one(kind: type) -> None:
    def size(agents) -> int:
        tensors = {tensor.data_ptr(): tensor.nbytes for rung in agents for tensor in agents[rung].storage}
        return sum(tensors.values())

    models = {rung: MODELS[rung] for rung in ROUTE}
    separate = {rung: kind(model, 4, 2048) for rung, model in models.items()}
    shared = SharedStreams(kind, models, 4, 2048)
    for agents in (separate, shared):
        play(RUNS, agents, PROMPTER, RandomMixing(HALF, seed=3), STEPS)
    assert size(separate) == 2 * size(shared) > 0


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^precisions.cache: shared needs a cache that can be cut, and that of model type"
    ):
        shared_streams({"float": model_of("bloom"), "int2": model_of("bloom")}, 2, 16)
    halves = {"float": HIGH, "int2": copy.deepcopy(LOW).bfloat16()}
    with pytest.raises(UserError, match=r"^precisions.cache: shared needs rungs that compute in one dtype"):
        SharedStreams(PackedStreams, halves, 2, 16)


def test_streams_are_chosen_as_for_each_alone() -> None:
    assert isinstance(shared_streams({"float": HIGH, "int2": LOW}, 2, 64)["int2"], type(token_streams(LOW, 2, 64)))
    gemma = model_of("gemma3")
    batched = token_streams(gemma, 2, 16)
    assert isinstance(shared_streams({"float": gemma, "int2": copy.deepcopy(gemma)}, 2, 16)["int2"], type(batched))
