"""The trainer on sequences of our own making, against gradients worked out by hand or by another way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from dmr_pipeline.recipe.grpo_router import GrpoRouter
from dmr_pipeline.rollout.cost import reward
from dmr_pipeline.rollout.policy import Draft
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.grpo_trainer import Rollout, RoutingTrainer, routing_log_probs, training_arguments
from dmr_pipeline.router.model import (
    Router,
    RoutingSequence,
    load_router,
    routing_sequence,
    save_router,
    sequence_of_trajectory,
)
from dmr_pipeline.router.policies import routing_policy
from tests.helpers.grpo_trainer import CHOICES, section
from tests.helpers.grpo_trainer import sequences as sequences_of
from tests.helpers.routers import CPU, ROUTES, play_with, random_router

Gradient = dict[str, Tensor]


THREE = [["int4", "float"], ["int2", "int4", "float"], ["float"], ["int2", "int4"]]
OFFSETS = {"float": -0.2, "int4": 0.4}


def sequences(router: Router) -> list[RoutingSequence]:
    return sequences_of(router, CHOICES if len(router.settings.route) == 2 else THREE)


def router_of(route: Sequence[str]) -> Router:
    return random_router(route, scale=0.7, offsets={rung: OFFSETS[rung] for rung in route[:-1]})


class Catch(TrainerCallback):
    """Keeps the gradient of the update. (Rewards below are so small that it is not clipped.)"""

    def on_pre_optimizer_step(self, *_: object, model: torch.nn.Module, **__: object) -> None:
        self.gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def trained_gradient(
    router: Router, played: Sequence[RoutingSequence], rewards: Sequence[float], folder: Path, settings: GrpoRouter
) -> tuple[Gradient, RoutingTrainer]:
    rollouts = [Rollout(*pair) for pair in zip(played, rewards, strict=True)]
    tasks = [f"game {i}" for i in range(settings.games_per_update)]
    catch = Catch()
    trainer = RoutingTrainer(router, tasks, lambda update, ids: rollouts, settings, folder, [catch])
    trainer.train()
    return catch.gradient, trainer


def by_hand(router: Router, played: Sequence[RoutingSequence], weights: Sequence[Sequence[float]]) -> Gradient:
    """Gradient of -sum(weight * log P(choice)) / decisions, from one plain forward pass an episode."""
    loss, settings = torch.zeros(()), router.settings
    for sequence, episode_weights in zip(played, weights, strict=True):
        logits = router.model(torch.tensor([sequence.tokens])).logits[0]
        for position, weight in zip(sequence.positions, episode_weights, strict=True):
            scores = settings.scale * logits[position, list(settings.tokens.values())]  # dearest first
            scores = scores + torch.tensor([settings.offsets.get(rung, 0.0) for rung in settings.route])
            acted = list(settings.tokens.values()).index(sequence.tokens[position + 1])
            loss = loss - weight * torch.log(torch.softmax(scores, 0)[acted])
    router.model.zero_grad()
    (loss / sum(map(len, weights))).backward()
    gradient = {name: parameter.grad.clone() for name, parameter in router.model.named_parameters()}
    router.model.zero_grad()
    return gradient


def assert_close(one: Gradient, other: Gradient) -> None:
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in other.values())
    assert largest > 1e-6
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-4 * largest, rtol=1e-3, msg=name)


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_probabilities_are_those_that_were_sampled_from(route: tuple[str, ...]) -> None:
    router = router_of(route)
    played = play_with(router, games=3, slots=6, sample=True)
    drawn = [sequence_of_trajectory(trajectory, router) for trajectory in played]
    prompt, width = 9, max(len(sequence.tokens) for sequence in drawn) + 14
    ids, mask = torch.zeros(len(drawn), width, dtype=torch.long), torch.zeros(len(drawn), width, dtype=torch.long)
    for row, sequence in enumerate(drawn):  # as trl pads: the prompt on the left, the completion on the right
        first = prompt - sequence.positions[0] % prompt
        ids[row, first : first + len(sequence.tokens)] = torch.tensor(sequence.tokens)
        mask[row, first : first + len(sequence.tokens)] = 1
    with torch.no_grad():
        log_probabilities, entropies = routing_log_probs(router.model, ids, mask, width - 1, router.settings, {})
    for row, (trajectory, sequence) in enumerate(zip(played, drawn, strict=True)):
        first = prompt - sequence.positions[0] % prompt
        columns = [first + position for position in sequence.positions]  # a token's place in the completion: one less
        p = np.diff([step.exceedance for step in trajectory.steps], axis=1, prepend=0.0, append=1.0)  # dearest first
        taken = [chances[route.index(step.precision)] for chances, step in zip(p, trajectory.steps, strict=True)]
        assert log_probabilities[row, columns].tolist() == pytest.approx(np.log(taken).tolist(), abs=1e-4)
        assert entropies[row, columns].tolist() == pytest.approx((-p * np.log(p)).sum(1).tolist(), abs=1e-4)
        others = ~torch.isin(ids[row, 1:], torch.tensor(router.settings.columns))
        assert not log_probabilities[row, others].any()


def test_one_gpu_of_several_is_used(tmp_path: Path) -> None:
    """trl refuses a process that would use more, and takes all that it sees if nobody says otherwise."""
    assert training_arguments(section(updates=1), tmp_path, CPU).n_gpu == 1


def test_one_step_bandit_is_reinforce_with_the_groups_mean_as_baseline(tmp_path: Path) -> None:
    """d loss / d score = -mean(advantage * (1[high] - p)), in closed form; the rest is the chain rule."""
    router = random_router(scale=0.8, offsets={"float": 0.3})
    choices, rewards = [True, False, True, False], [0.03, 0.01, 0.02, 0.0]
    played = [
        routing_sequence([[10, 11, 12]], [[20]], ["float" if high else "int2"], router.settings) for high in choices
    ]
    logits, tokens = router.model(torch.tensor([[10, 11, 12]])).logits[0, -1], router.settings.tokens
    margin = logits[tokens["float"]] - logits[tokens["int2"]]
    p = 1 / (1 + math.exp(-(0.8 * margin.item() + 0.3)))
    mean = sum(rewards) / 4
    slope = -sum((r - mean) * (high - p) for r, high in zip(rewards, choices, strict=True)) / 4
    router.model.zero_grad()
    (margin * 0.8 * slope).backward()
    expected = {name: parameter.grad.clone() for name, parameter in router.model.named_parameters()}
    router.model.zero_grad()
    settings = section(games_per_update=1, group_size=4)
    gradient, _ = trained_gradient(router, played, rewards, tmp_path, settings)
    assert_close(gradient, expected)


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_only_routing_tokens_are_trained_each_alike_whatever_the_length(tmp_path: Path, route: tuple[str, ...]) -> None:
    router = router_of(route)
    played = sequences(router)
    expected = by_hand(router, played, [[0.005] * 2, [-0.005] * 3, [0.01], [-0.01] * 2])
    gradient, _ = trained_gradient(router, played, [0.01, 0.0, 0.03, 0.01], tmp_path, section())
    assert_close(gradient, expected)


def test_forced_steps_have_no_gradient_and_no_share_in_the_mean(tmp_path: Path) -> None:
    """Of eight steps four were forced, among them all of the third episode's."""
    router = router_of(ROUTES[0])
    played, forced = sequences(router), [{0}, {0, 2}, {0}, set()]
    expected = by_hand(router, played, [[0.0, 0.005], [0.0, -0.005, 0.0], [0.0], [-0.01] * 2])
    rollouts = [
        Rollout(sequence, reward, frozenset(steps))
        for sequence, reward, steps in zip(played, [0.01, 0.0, 0.03, 0.01], forced, strict=True)
    ]
    catch = Catch()
    RoutingTrainer(router, ["a", "b"], lambda update, ids: rollouts, section(), tmp_path, [catch]).train()
    assert_close(catch.gradient, {name: gradient * 8 / 4 for name, gradient in expected.items()})


@pytest.mark.parametrize("kind", ["gated", "difference"])
def test_gradient_scales_with_the_costs_weight_where_all_succeed(tmp_path: Path, kind: str) -> None:
    costs = [0.3, 0.5, 0.4, 0.9]
    gradients = []
    for weight in (0.01, 0.02):
        router, settings = random_router(), section(cost_weight=weight, reward=kind)
        rewards = [reward(success=True, cost=cost, section=settings) for cost in costs]
        gradient, _ = trained_gradient(router, sequences(router), rewards, tmp_path / str(weight), settings)
        gradients.append(gradient)
    assert_close({name: 2 * gradient for name, gradient in gradients[0].items()}, gradients[1])


def test_reward_of_failure() -> None:
    for cost in (0.2, 2.0):
        assert reward(success=False, cost=cost, section=section(reward="gated")) == 0.0  # cheap failure does not pay
        assert reward(success=False, cost=cost, section=section(reward="difference")) == pytest.approx(-0.1 * cost)


def test_groups_that_tie_have_no_gradient(tmp_path: Path) -> None:
    router = random_router()
    gradient, _ = trained_gradient(router, sequences(router), [0.7, 0.7, 0.2, 0.2], tmp_path, section())
    assert all(not value.any() for value in gradient.values())


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_beta_pulls_towards_the_router_in_the_folder(tmp_path: Path, route: tuple[str, ...]) -> None:
    """With rewards that tie, the gradient is beta times that of the KL between choices: (log P - log P_start) grad log P."""
    save_router(router_of(route), tmp_path / "start")
    router, start = load_router(tmp_path / "start", CPU), load_router(tmp_path / "start", CPU)
    _, trainer = trained_gradient(router, sequences(router), [0.0] * 4, tmp_path / "same", section(beta=0.1))
    assert trainer.state.log_history[-1]["kl"] == pytest.approx(0.0, abs=1e-9)

    with torch.no_grad():
        for parameter in router.model.parameters():
            parameter.mul_(1.02)
    played = sequences(router)
    weights = []
    with torch.no_grad():
        for sequence in played:
            ids = torch.tensor([sequence.tokens])
            mask = torch.ones_like(ids)
            one, other = (
                routing_log_probs(r.model, ids, mask, ids.shape[1], r.settings, {})[0][0] for r in (router, start)
            )
            weights.append([-0.1 * float((one - other)[position + 1]) for position in sequence.positions])
    expected = by_hand(router, played, weights)
    gradient, _ = trained_gradient(router, played, [0.0] * 4, tmp_path / "moved", section(beta=0.1))
    assert_close(gradient, expected)


class NothingToPeekAt:
    """An LM router needs nothing of the agents."""

    def drafts(self, precision: str, slots: Sequence[int]) -> list[Draft]:
        raise AssertionError

    def states(self, slots: Sequence[int], layers: Sequence[int]) -> Tensor:
        raise AssertionError

    def admissible_commands(self, slots: Sequence[int]) -> list[Sequence[str]]:
        raise AssertionError


@dataclass(frozen=True)
class Marked:
    """A task whose steps are at high precision rightly where the segment holds the marker."""

    task_id: str
    task_type: str = "marked"
    instruction: str = ""

    def steps(self) -> list[list[int]]:
        rng = np.random.default_rng(int(self.task_id))
        return [[int(t) for t in rng.integers(40, 90, 4)] + [100 + int(rng.random() < 0.5)] for _ in range(4)]


def test_learns_where_high_precision_pays(tmp_path: Path) -> None:
    settings = section(updates=25, games_per_update=4, group_size=8, learning_rate=0.003, validate_every=100)
    router = random_router()

    def rollouts(update: int, task_ids: list[str], sample: bool = True) -> list[Rollout]:
        policy = routing_policy(router, len(task_ids), sample=sample, seed=update)
        slots, tasks = range(len(task_ids)), [Marked(task_id) for task_id in task_ids]
        acted: list[list[str]] = [[] for _ in slots]
        for slot in slots:
            policy.begin(slot, RolloutRequest(tasks[slot], member=slot))
        for turn in range(4):
            segments = [task.steps()[turn] for task in tasks]
            for slot, decision in enumerate(policy.decide(slots, segments, NothingToPeekAt())):
                acted[slot].append(decision.precision)
                policy.acted(slot, segments[slot], decision.precision, [20, 5])
        result = []
        for task, chosen in zip(tasks, acted, strict=True):
            steps = task.steps()
            right = ["float" if segment[-1] == 101 else "int2" for segment in steps]
            share = float(np.mean(np.equal(right, chosen)))
            result.append(Rollout(routing_sequence(steps, [[20, 5]] * 4, chosen, router.settings), share))
        return result

    unseen = [str(1000 + i) for i in range(40)]
    before = np.mean([rollout.reward for rollout in rollouts(0, unseen, sample=False)])
    tasks = [str(i) for i in range(100)]
    RoutingTrainer(router, tasks, rollouts, settings, tmp_path, []).train()
    after = np.mean([rollout.reward for rollout in rollouts(0, unseen, sample=False)])
    assert before < 0.7
    assert after > 0.95
