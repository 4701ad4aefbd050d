"""A routed agent in a loop of its own does what the pipeline's rollouts do."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.acting import ActingModels
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.kl_router import Probe, RouterModel
from dmr_pipeline.recipe.precisions import PromptLookup, Speculative
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.model import new_router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.serve.agent import Action, Budget, Goal, RoutedAgent, Turn
from dmr_pipeline.serve.deciders import decider_of
from dmr_pipeline.serve.local import Ask, LocalAgents
from tests.helpers.probes import new_probe
from tests.helpers.routers import AGENTS, CPU, ROUTE, TOKENIZER, random_router
from tests.helpers.serving import as_told, babbling, play_by_hand

RUNS = [RolloutRequest(generate_game(seed, 50)[0], member) for seed in range(3) for member in range(2)]
ROUTERS = {"lm": random_router, "probe": new_probe}


def median_threshold(make, **settings):
    """A router at a threshold at which both rungs act, none of the levels being close to it."""
    played = babbling().play(RUNS, routing_policy(make(**settings), len(RUNS)), 0)
    levels = sorted(step.exceedance[0] for trajectory in played for step in trajectory.steps)
    middle = levels[len(levels) // 3 : -len(levels) // 3]
    _, low, high = max((after - before, before, after) for before, after in pairwise(middle))
    return make(threshold=(low + high) / 2, **settings)


@pytest.mark.parametrize("kind", ROUTERS)
def test_episodes_are_those_of_the_pipelines_rollouts(kind: str) -> None:
    """Everything of them: tokens, precisions, probabilities, what was read."""
    router, rollouts = median_threshold(ROUTERS[kind]), babbling()
    played = rollouts.play(RUNS, routing_policy(router, len(RUNS)), 0)
    agent = RoutedAgent(rollouts, router)
    by_hand = [play_by_hand(agent, run, rollouts.step_limit) for run in RUNS]
    assert as_told(by_hand) == as_told(played)
    assert {step.precision for trajectory in by_hand for step in trajectory.steps} == set(ROUTE)


def test_one_precision_throughout_and_drawn_actions() -> None:
    rollouts = babbling(temperature=1.0)
    played = rollouts.play(RUNS, SinglePrecision("int2", ROUTE), 5)
    agent = RoutedAgent(rollouts, "int2", seed=5)
    assert as_told([play_by_hand(agent, run, rollouts.step_limit) for run in RUNS]) == as_told(played)
    with pytest.raises(UserError, match="'int3' is none of the rungs that are loaded"):
        RoutedAgent(rollouts, "int3")


def test_a_precision_that_checks_drafts_does_what_it_does_alone_for_other_readings() -> None:
    rollouts = babbling()
    checks = SinglePrecision("float", ROUTE, "int2")
    played, alone = rollouts.play(RUNS, checks, 0), rollouts.play(RUNS, SinglePrecision("float", ROUTE), 0)
    by_hand = [play_by_hand(RoutedAgent(rollouts, "float<int2"), run, rollouts.step_limit) for run in RUNS]
    assert as_told(by_hand) == as_told(played)
    assert [[s.action for s in t.steps] for t in by_hand] == [[s.action for s in t.steps] for t in alone]
    assert as_told(by_hand) != as_told(alone)
    with pytest.raises(UserError, match="'int3' is none of"):
        RoutedAgent(rollouts, "float<int3")
    with pytest.raises(UserError, match="drafts cannot be checked here"):
        RoutedAgent(babbling(action="score"), "float<int2")


def test_what_is_looked_up_is_so_in_a_session_too() -> None:
    looking, plain = babbling(prompt_lookup=PromptLookup()), babbling()
    played = looking.play(RUNS, SinglePrecision("int2", ROUTE), 0)
    by_hand = [play_by_hand(RoutedAgent(looking, "int2"), run, looking.step_limit) for run in RUNS]
    assert as_told(by_hand) == as_told(played)
    alone = [play_by_hand(RoutedAgent(plain, "int2"), run, plain.step_limit) for run in RUNS]
    assert [[s.action for s in t.steps] for t in by_hand] == [[s.action for s in t.steps] for t in alone]
    passes = [sum(s.reading.passes for t in episodes for s in t.steps) for episodes in (by_hand, alone)]
    assert passes[0] < 0.95 * passes[1]


def test_one_rung_that_is_loaded_alone_is_an_agent() -> None:
    rollouts = babbling()
    acting = rollouts.acting
    one = ActingModels({"int2": acting.models["int2"]}, {"int2": acting.pass_bytes["int2"]}, acting.device)
    played = rollouts.play(RUNS, SinglePrecision("int2", ROUTE), 0)
    agent = RoutedAgent(replace(rollouts, acting=one), "int2")
    by_hand = [play_by_hand(agent, run, rollouts.step_limit) for run in RUNS]
    assert [[s.action for s in t.steps] for t in by_hand] == [[s.action for s in t.steps] for t in played]


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("shared", [False, True])
def test_sessions_side_by_side_in_fewer_places_do_the_same(kind: str, shared: bool) -> None:
    """Their turns come in any order, and each loses its place again and again."""
    router, rollouts = median_threshold(ROUTERS[kind]), babbling(shared_cache=shared)
    played = rollouts.play(RUNS, routing_policy(router, len(RUNS)), 0)
    agents = LocalAgents(rollouts, slots=2)
    decider = decider_of(router, 2)
    sessions = [agents.open(str(i), run, decider) for i, run in enumerate(RUNS)]
    episodes = [run.task.episode() for run in RUNS]
    shown = [episode.reset() for episode in episodes]
    over = [False] * len(RUNS)
    for start in itertools.cycle(range(len(RUNS))):
        order = [*range(start, len(RUNS)), *range(start)]
        live = [i for i in order if not over[i] and sessions[i].turn < rollouts.step_limit][:3]
        if not live:
            break
        for i, action in zip(live, agents.act([Ask(sessions[i], shown[i]) for i in live]), strict=True):
            assert not isinstance(action, UserError)
            shown[i], _, over[i] = episodes[i].step(action.command)
    done = [session.trajectory for session in sessions]
    assert [[s.action for s in t.steps] for t in done] == [[s.action for s in t.steps] for t in played]
    assert [[s.precision for s in t.steps] for t in done] == [[s.precision for s in t.steps] for t in played]
    if kind == "probe":  # a router that is a model of its own reads again what it has lost
        assert [[s.readings for s in t.steps] for t in done] == [[s.readings for s in t.steps] for t in played]


def turns_of(trajectory: Trajectory, count: int) -> list[Turn]:
    shown = [trajectory.opening, *(step.observation for step in trajectory.steps)]
    return [Turn(shown[i], step.command, "", step.precision) for i, step in enumerate(trajectory.steps[:count])]


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_router_alone_decides_as_it_does_in_an_episode(kind: str) -> None:
    router, rollouts = median_threshold(ROUTERS[kind]), babbling()
    # The agents babble: what they do is what a command says only where they happen to write one.
    played = rollouts.play(RUNS[:2], SinglePrecision("int2", ROUTE), 0)
    told = [replace(t, steps=[replace(s, action=rollouts.prompter.action(s.command)) for s in t.steps]) for t in played]
    agent = RoutedAgent(rollouts, router)
    for trajectory in told:
        shown = [trajectory.opening, *(step.observation for step in trajectory.steps)]
        for count in (0, 2, 5):
            decision = agent.decide(trajectory.run.task, turns_of(trajectory, count), shown[count])
            assert decision.exceedance == pytest.approx(expected_level(router, rollouts, trajectory, count), abs=1e-4)


def expected_level(router, rollouts, trajectory: Trajectory, count: int) -> Sequence[float]:
    """From one plain forward pass over the whole transcript."""
    from dmr_pipeline.router.model import routing_logits, routing_sequence, with_features

    steps = trajectory.steps[: count + 1]
    precisions = [step.precision for step in steps]
    sequence = routing_sequence([s.segment for s in steps], [s.action for s in steps], precisions, router.settings)
    (sequence,) = with_features(router, [sequence], 1)
    return router.settings.exceedance(routing_logits(router.model, [sequence], router.settings).double())[-1].tolist()


def test_a_budget_holds_at_every_step() -> None:
    rollouts = babbling()
    agent = RoutedAgent(rollouts, random_router(threshold=0.0))  # always the dearest, if it may
    for run in RUNS[:2]:
        episode = run.task.episode()
        observation = episode.reset()
        agent.begin(run.task, run.member, Budget(high_ratio=0.4))
        for turn in range(1, 8):
            action = agent.act(observation)
            observation, _, over = episode.step(action.command)
            assert agent.session.spend <= 0.4 * turn
            assert action.reason == ("router" if action.precision == "float" else "budget")
            assert not over
        assert agent.session.spend == 2  # and it is used: of 7 steps 2.8 were allowed


def test_a_cost_is_not_exceeded_by_the_dearest_rung() -> None:
    agent = RoutedAgent(babbling(), random_router(threshold=0.0))
    spent, dear_steps = [], []
    for share in (None, 0.0, 0.6):
        limit = None if share is None else share * spent[0]
        agent.begin(RUNS[0].task, budget=Budget(cost=limit))
        episode = RUNS[0].task.episode()
        observation, dear = episode.reset(), []
        for _ in range(7):
            action = agent.act(observation)
            observation, _, _ = episode.step(action.command)
            dear.append(action.precision == "float")
            if dear[-1] and limit is not None:
                assert agent.session.cost <= limit
        spent.append(agent.session.cost)
        dear_steps.append(sum(dear))
    assert dear_steps[:2] == [7, 0]
    assert 0 < dear_steps[2] < 7


@pytest.mark.parametrize("lookup", [None, PromptLookup()])
@pytest.mark.parametrize("draft_tokens", [None, 2])
def test_a_cost_is_not_exceeded_where_drafts_are_checked(draft_tokens: int | None, lookup: PromptLookup | None) -> None:
    """Babblers draft what is hardly ever taken, again and again."""
    rollouts = babbling(speculative=Speculative(draft_tokens=draft_tokens), prompt_lookup=lookup)
    checked, kept = 0, 0
    for run in RUNS[::2]:
        for limit in (300.0, 1000.0, 4000.0, 16000.0):
            agent = RoutedAgent(rollouts, "float<int2")
            agent.begin(run.task, budget=Budget(cost=limit))
            episode = run.task.episode()
            observation = episode.reset()
            for _ in range(7):
                action = agent.act(observation)
                observation, _, _ = episode.step(action.command)
                checked += action.precision == "float"
                kept += action.reason == "budget"
                assert action.precision == "int2" or agent.session.cost <= limit
    assert checked > 5 < kept


def test_exploration_draws_as_often_as_it_says_and_tells_its_propensity() -> None:
    agents = LocalAgents(babbling(), slots=1, epsilon=0.5)
    decider = decider_of(random_router(threshold=1.0), 1)  # the cheapest, if nothing is drawn
    choices = []
    for number in range(12):
        session = agents.open(str(number), RUNS[0], decider)
        episode = RUNS[0].task.episode()
        observation = episode.reset()
        for _ in range(4):
            (action,) = agents.act([Ask(session, observation)])
            assert not isinstance(action, UserError)
            observation, _, _ = episode.step(action.command)
            choices.append(action)
        agents.close(session)
    dear = [action for action in choices if action.precision == "float"]
    assert 5 <= len(dear) <= 20  # of 48, a quarter
    assert {action.propensity for action in dear} == {0.25}
    assert {action.propensity for action in choices if action.precision == "int2"} == {0.75}
    assert {action.reason for action in dear} == {"exploration"}


def test_a_router_that_draws_tells_with_which_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as it says: of decisions at the same levels, so many."""
    router = random_router(threshold=0.5, sample=True)
    agents, found = LocalAgents(babbling(), slots=1), []
    decider = decider_of(router, 1)
    for number in range(60):
        goal = Goal(f"kitchen/{number}", "", "put a mug in desk")
        session = agents.open(str(number), RolloutRequest(goal), decider)
        (action,) = agents.act([Ask(session, "You are in a room.")])
        assert not isinstance(action, UserError)
        agents.close(session)
        found.append(action)
    level = found[0].probability
    assert level is not None
    assert 0.02 < level < 0.98
    for action in found:
        chance = level if action.precision == "float" else 1 - level
        assert action.propensity == pytest.approx(chance, abs=1e-4)
    dear = sum(action.precision == "float" for action in found)
    assert abs(dear - 60 * level) < 4 * (60 * level * (1 - level)) ** 0.5


class Broken:
    """A router that fails at its second decision, after it has read things that it should not."""

    def __init__(self, policy) -> None:
        self.policy, self.asked = policy, 0

    def begin(self, slot, run):
        self.policy.begin(slot, run)

    def decide(self, slots, segments, peek):
        decisions = self.policy.decide(slots, segments, peek)
        self.asked += 1
        if self.asked == 2:
            self.policy.decide(slots, segments, peek)
            raise ValueError("a fault")
        return decisions

    def acted(self, slot, segment, precision, action):
        self.policy.acted(slot, segment, precision, action)


def test_where_the_router_fails_the_agent_acts_and_later_decisions_are_as_if_it_had_not() -> None:
    rollouts, router = babbling(), random_router(threshold=1.0)
    agents = LocalAgents(rollouts, slots=1)
    decider = decider_of(router, 1)
    session = agents.open("a", RUNS[0], replace(decider, policy=Broken(decider.policy)))
    episode = RUNS[0].task.episode()
    observation, found = episode.reset(), []
    for _ in range(4):
        (action,) = agents.act([Ask(session, observation)])
        assert not isinstance(action, UserError)
        observation, _, _ = episode.step(action.command)
        found.append(action)
    assert [action.reason for action in found] == ["router", "fallback", "router", "router"]
    assert [action.precision for action in found] == ["int2", "float", "int2", "int2"]
    assert found[1].probability is None
    assert agents.deciding.failures == 1
    for turn in (2, 3):
        level = expected_level(router, rollouts, session.trajectory, turn)
        assert session.trajectory.steps[turn].exceedance == pytest.approx(level, abs=1e-4)


def test_a_session_that_its_router_cannot_read_does_not_stop_the_others() -> None:
    """It was begun with a precision that this router has no token for."""
    rollouts, router = babbling(), random_router(threshold=1.0)
    decider = decider_of(router, 2)

    def acted(*sessions: list[Turn]) -> list[Action]:
        agents = LocalAgents(rollouts, slots=2)
        opened = [agents.open(str(i), RUNS[0], decider, past=past) for i, past in enumerate(sessions)]
        actions = agents.act([Ask(session, "You see a mug 1.") for session in opened])
        assert all(isinstance(action, Action) for action in actions)
        return actions

    (alone,) = acted([])
    unreadable, beside = acted([Turn("You are in a room.", "look", precision="int9")], [])
    assert (unreadable.reason, unreadable.precision) == ("fallback", "float")
    assert (beside.reason, beside.command, beside.precision) == ("router", alone.command, alone.precision)
    assert beside.probability == pytest.approx(alone.probability, abs=1e-4)


class Picky:
    """Fails where it is asked of this session."""

    def __init__(self, policy, agents: LocalAgents, name: str) -> None:
        self.policy, self.agents, self.name = policy, agents, name
        self.begin, self.acted = policy.begin, policy.acted

    def decide(self, slots, segments, peek):
        if any(self.agents.deciding.sessions[slot].session_id == self.name for slot in slots):
            raise UserError("this turn came without its commands")
        return self.policy.decide(slots, segments, peek)


def test_who_cannot_be_decided_of_does_not_take_the_router_from_the_others() -> None:
    router = random_router(threshold=1.0)

    def acted(*names: str) -> list[Action]:
        agents = LocalAgents(babbling(), slots=3)
        decider = decider_of(router, 3)
        decider = replace(decider, policy=Picky(decider.policy, agents, "bad"))
        sessions = [agents.open(name, run, decider) for name, run in zip(names, RUNS[::2], strict=False)]
        found = agents.act([Ask(s, s.trajectory.run.task.episode().reset()) for s in sessions])
        assert agents.deciding.failures == names.count("bad")
        return found

    alone, beside = acted("a", "b"), acted("a", "b", "bad")
    assert [action.reason for action in beside] == ["router", "router", "fallback"]
    for one, other in zip(alone, beside, strict=False):
        assert (one.command, one.precision) == (other.command, other.precision)
        assert one.probability == pytest.approx(other.probability, abs=1e-4)


def test_what_nobody_decided_is_no_decision_below_a_budget_either() -> None:
    agents = LocalAgents(babbling(), slots=1)
    decider = decider_of(random_router(threshold=1.0), 1)
    picky = replace(decider, policy=Picky(decider.policy, agents, "bad"))
    session = agents.open("bad", RUNS[0], picky, Budget(high_ratio=0.0))
    (action,) = agents.act([Ask(session, RUNS[0].task.episode().reset())])
    assert (action.reason, action.precision, action.probability, action.threshold) == ("fallback", "int2", None, None)


@pytest.mark.parametrize("kind", ["probe", "lm"])
def test_after_a_step_that_failed_others_act_as_if_it_had_not_been(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the router had read for it belongs to nobody."""
    router, runs = ROUTERS[kind](threshold=0.0), RUNS[::2]

    def act(agents: LocalAgents, number: int) -> Action:
        session = agents.open(str(number), runs[number], decider_of(router, 1))
        (action,) = agents.act([Ask(session, runs[number].task.episode().reset())])
        return action

    fresh, agents = LocalAgents(babbling(), slots=1), LocalAgents(babbling(), slots=1)
    with monkeypatch.context() as patch:
        patch.setattr(agents.batch, "_generate", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
        with pytest.raises(torch.OutOfMemoryError):
            act(agents, 0)
    for number in (1, 2):
        one, other = act(agents, number), act(fresh, number)
        assert (one.command, one.reason, one.precision) == (other.command, "router", other.precision)


def test_what_would_be_decided_is_not_written_as_another_request_wished() -> None:
    rollouts = babbling()
    agents, other = LocalAgents(rollouts, slots=1), LocalAgents(rollouts, slots=1)
    observation, levels = RUNS[0].task.episode().reset(), []
    for asked in (agents, other):
        if asked is agents:
            busy = asked.open("b", RUNS[2], asked.untrained("int2"))
            asked.act([Ask(busy, RUNS[2].task.episode().reset(), temperature=1.5, max_tokens=1)])
        session = asked.open("a", RUNS[0], asked.untrained("margin>0.5"))
        levels.append(asked.decide(Ask(session, observation)).decision.exceedance)
    assert levels[0] == pytest.approx(levels[1], abs=1e-6)


def test_with_one_cache_an_episode_that_is_read_again_goes_on_as_it_would_have() -> None:
    """Who has read what is known of each step, though the keys and values are gone."""
    rollouts = babbling(shared_cache=True)

    def play(left_at: int | None) -> list[list[int]]:
        agents = LocalAgents(rollouts, slots=1)
        deciders = [agents.untrained(rung) for rung in ROUTE]
        session, episode = agents.open("a", RUNS[0], deciders[0]), RUNS[0].task.episode()
        observation = episode.reset()
        for turn in range(7):
            if turn == left_at:
                agents.close(session)
            session.decider = deciders[turn % 2]
            (action,) = agents.act([Ask(session, observation)])
            observation, _, _ = episode.step(action.command)
        return [step.action for step in session.trajectory.steps]

    undisturbed = play(None)
    assert [play(left_at) for left_at in (3, 4, 6)] == [undisturbed] * 3


def test_a_past_of_which_a_prompt_would_tell_more_than_is_known_is_refused() -> None:
    prompt = Prompt(turn="{observation}\n{admissible_commands}\n> ")
    agents = LocalAgents(babbling(prompter=Prompter.of(TOKENIZER, prompt)), slots=1)
    with pytest.raises(UserError, match="which is not known of its past: begin another session"):
        agents.open("a", RUNS[0], agents.untrained("int2"), past=[Turn("You are in a room.", "look")])


def test_whatever_happens_to_a_session_the_others_act(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = LocalAgents(babbling(), slots=2)
    decider = agents.untrained("int2")
    bad, good = (agents.open(name, RUNS[0], decider) for name in ("bad", "good"))
    begin = agents.batch.begin

    def begun(slot: int, *rest: object) -> None:
        if agents.deciding.sessions[slot] is bad:
            raise ValueError("not foreseen")
        begin(slot, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(agents.batch, "begin", begun)
        failed, acted = agents.act([Ask(bad, "You are in a room."), Ask(good, "You are in a room.")])
    assert isinstance(failed, ValueError)
    (again,) = agents.act([Ask(bad, "You are in a room.")])
    assert again.command == acted.command


def test_commands_to_choose_among_are_needed_where_they_are_scored() -> None:
    agents = LocalAgents(babbling(action="score"), slots=2)
    decider = agents.untrained("int2")
    bad, good = (agents.open(name, RUNS[0], decider) for name in ("bad", "good"))
    none, chosen = agents.act([Ask(bad, "A room.", []), Ask(good, "A room.", ["look", "inventory"])])
    assert isinstance(none, UserError)
    assert chosen.command in ("look", "inventory")


def test_the_last_margin_is_known_to_a_session_that_is_read_again() -> None:
    model = RouterModel(probe=Probe(layers=(), features=("margin",), hidden=0))
    router = new_router(model, ROUTE, TOKENIZER, 3, CPU, AGENTS["int2"])
    episode, levels = RUNS[0].task.episode(), []
    agents = LocalAgents(babbling(), slots=1)
    session, observation = agents.open("a", RUNS[0], decider_of(router, 1)), episode.reset()
    for _ in range(3):
        decided = agents.decide(Ask(replace(session), observation)).decision.exceedance
        (action,) = agents.act([Ask(session, observation)])
        assert decided == pytest.approx(session.trajectory.steps[-1].exceedance, abs=1e-6)
        levels.append(decided[0])
        observation, _, _ = episode.step(action.command)
        agents.close(session)  # what it has read is gone
    assert session.margin < 0.9
    assert len({round(level, 4) for level in levels}) > 1, "it looks at the margin"


def test_another_router_takes_over_in_the_midst_of_an_episode() -> None:
    """It decides as if it had been there from the beginning."""
    rollouts, agents = babbling(), LocalAgents(babbling(), slots=1)
    first, second = random_router(threshold=0.0), new_probe(threshold=1.0)
    session = agents.open("a", RUNS[0], decider_of(first, 1, 1))
    episode = RUNS[0].task.episode()
    observation = episode.reset()
    for turn in range(4):
        if turn == 2:
            session.decider = decider_of(second, 1, 2)
        (action,) = agents.act([Ask(session, observation)])
        assert not isinstance(action, UserError)
        assert (action.release, action.precision) == ((1, "float") if turn < 2 else (2, "int2"))
        observation, _, _ = episode.step(action.command)
    level = expected_level(second, rollouts, session.trajectory, 3)
    assert session.trajectory.steps[3].exceedance == pytest.approx(level, abs=1e-4)


def test_what_cannot_go_on_says_why() -> None:
    agent = RoutedAgent(babbling(step_limit=1), "int2")
    with pytest.raises(UserError, match="begin"):
        agent.act("a room")
    agent.begin(Goal("kitchen/17", "pick_and_place_simple", "put some apple on sidetable."))
    action = agent.act("You are in a room.")
    assert (action.turn, action.reason, action.probability) == (1, "fixed", None)
    with pytest.raises(UserError, match="1 steps"):
        agent.act("Nothing happens.")
    small = RoutedAgent(babbling(capacity=70), "int2")
    small.begin(RUNS[0].task)
    with pytest.raises(UserError, match="max_transcript_tokens"):
        small.act("mug " * 100)
    small.act("You are in a room.")
    with pytest.raises(UserError, match="none for another step"):
        small.act("mug " * 60)
