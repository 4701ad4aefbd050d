"""Rollouts: exact switching between precisions, independent of how episodes are batched."""

import copy

import pytest
import torch

from dmr_pipeline.agent.prompts import Prompter
from dmr_pipeline.agent.rollout import Decision, Peek, Run, SinglePrecision, Trajectory, play
from dmr_pipeline.agent.streams import Streams
from dmr_pipeline.agent.train import new_model
from dmr_pipeline.agent.vocabulary import word_tokenizer
from dmr_pipeline.cost import episode_cost
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.environments.tasks import begin_episode
from dmr_pipeline.recipe import Architecture, Prompt
from dmr_pipeline.router.baselines import Confidence, Disagreement, RandomMixing

PROMPTER = Prompter.of(word_tokenizer(alfworld_texts()), Prompt(max_action_tokens=6))
ARCHITECTURE = Architecture(layers=2, width=32, heads=2, key_value_heads=1, head_width=16, feed_forward=32)
HIGH = new_model(ARCHITECTURE, len(PROMPTER.tokenizer), 1).eval()
with torch.no_grad():  # fresh weights repeat the token they read; these wander
    for parameter in HIGH.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    LOW = copy.deepcopy(HIGH)
    for parameter in LOW.parameters():
        parameter += 0.01 * torch.randn_like(parameter)
RUNS = [Run(generate_game(seed)[0]) for seed in range(7)]
STEPS = 6


def roll(policy, slots=7, action="generate", temperature=0.0, seed=0) -> list[Trajectory]:
    agents = {True: Streams(HIGH, slots, 2048), False: Streams(LOW, slots, 2048)}
    return play(RUNS, agents, PROMPTER, policy, STEPS, action=action, temperature=temperature, seed=seed)


def taken(played: list[Trajectory]) -> list[list[list[int]]]:
    return [[step.action for step in trajectory.steps] for trajectory in played]


def transcript(trajectory: Trajectory, turn: int) -> list[int]:
    before = [step.segment + step.action for step in trajectory.steps[:turn]]
    return [token for part in before for token in part] + trajectory.steps[turn].segment


@torch.no_grad()
def greedy_uncached(model, prefix: list[int]) -> list[int]:
    action: list[int] = []
    while len(action) < 6 and (not action or action[-1] != PROMPTER.end_token):
        logits = model(torch.tensor([prefix + action])).logits[0, -1]
        action.append(int(logits.argmax()))
    return action


def test_every_action_is_the_acting_precisions_own_without_any_cache() -> None:
    played = roll(RandomMixing(0.5, seed=3))
    assert {step.high for trajectory in played for step in trajectory.steps} == {True, False}
    for trajectory in played:
        for turn, step in enumerate(trajectory.steps):
            model = HIGH if step.high else LOW
            assert step.action == greedy_uncached(model, transcript(trajectory, turn))


def test_the_disagreement_oracle_repeats_always_high() -> None:
    oracle, high, low = roll(Disagreement()), roll(SinglePrecision(high=True)), roll(SinglePrecision(high=False))
    assert taken(oracle) == taken(high)
    assert taken(low) != taken(high)
    ratios = [trajectory.high_ratio for trajectory in oracle]
    assert 0 < sum(ratios) < len(ratios)


@torch.no_grad()
def test_the_cascade_acts_high_where_the_low_draft_was_unsure_and_pays_for_the_draft() -> None:
    probabilities = [step.probability for t in roll(Confidence(2.0)) for step in t.steps]
    threshold = (min(probabilities) + max(probabilities)) / 2
    played = roll(Confidence(threshold), slots=3)
    precisions = set()
    for trajectory in played:
        for turn, step in enumerate(trajectory.steps):
            prefix = transcript(trajectory, turn)
            draft = greedy_uncached(LOW, prefix)
            leads = []
            for i in range(len(draft)):
                best = LOW(torch.tensor([prefix + draft[:i]])).logits[0, -1].softmax(-1).sort(descending=True).values
                leads.append(float(best[0] - best[1]))
            assert step.probability == pytest.approx(1 - min(leads), abs=1e-4)
            assert step.high == (step.probability >= threshold)
            assert step.action == (greedy_uncached(HIGH, prefix) if step.high else draft)
            assert step.drafted == (len(draft) if step.high else 0)
            precisions.add(step.high)
        by_hand = sum(100 * (s.drafted or len(s.action)) + 1000 * len(s.action) * s.high for s in trajectory.steps)
        assert episode_cost(trajectory, {True: 1000, False: 100}) == by_hand
    assert precisions == {False, True}


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_slots(slots: int) -> None:
    assert taken(roll(RandomMixing(0.5, seed=3), slots)) == taken(roll(RandomMixing(0.5, seed=3)))


def test_drawn_actions_depend_on_the_seed_alone() -> None:
    policy = SinglePrecision(high=True)
    first = taken(roll(policy, temperature=1.0, seed=5))
    assert first == taken(roll(policy, slots=2, temperature=1.0, seed=5))
    assert first != taken(roll(policy, temperature=1.0, seed=6))


@torch.no_grad()
def test_scoring_takes_the_likeliest_admissible_command() -> None:
    for trajectory in roll(SinglePrecision(high=True), action="score"):
        episode = begin_episode(trajectory.run.task)
        episode.reset()
        for turn, step in enumerate(trajectory.steps):
            prefix, scores = transcript(trajectory, turn), {}
            for command in episode.admissible_commands():
                action = PROMPTER.action(command)
                logits = HIGH(torch.tensor([prefix + action])).logits[0].log_softmax(-1)
                scores[command] = sum(float(logits[len(prefix) - 1 + i, token]) for i, token in enumerate(action))
            assert step.command == max(scores, key=scores.__getitem__)
            episode.step(step.command)


def test_the_policy_hears_of_every_segment_and_action() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.heard: dict[str, list[int]] = {}
            self.task_of: dict[int, str] = {}

        def begin(self, slot: int, run: Run) -> None:
            self.task_of[slot] = run.task.task_id
            self.heard[run.task.task_id] = []

        def decide(self, slots: list[int], segments: list[list[int]], peek: Peek) -> list[Decision]:
            for slot, segment in zip(slots, segments, strict=True):
                self.heard[self.task_of[slot]] += segment
            return [Decision(True, 1.0) for _ in slots]

        def acted(self, slot: int, action: list[int]) -> None:
            self.heard[self.task_of[slot]] += action

    recorder = Recorder()
    for trajectory in roll(recorder, slots=3):
        last = len(trajectory.steps) - 1
        whole = transcript(trajectory, last) + trajectory.steps[last].action
        assert recorder.heard[trajectory.run.task.task_id] == whole


def test_cost_counts_a_forward_pass_for_each_generated_token() -> None:
    trajectory = roll(RandomMixing(0.5, seed=3))[0]
    by_hand = sum((1000 if step.high else 100) * len(step.action) + 7 for step in trajectory.steps)
    assert episode_cost(trajectory, {True: 1000, False: 100}, router_bytes=7) == by_hand


def test_processed_tokens_cover_the_transcript_once_for_a_single_precision() -> None:
    for trajectory in roll(SinglePrecision(high=True)):
        whole = sum(len(step.segment) + len(step.action) for step in trajectory.steps)
        assert sum(step.processed for step in trajectory.steps) == whole - 1
