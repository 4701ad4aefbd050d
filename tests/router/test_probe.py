"""The probe router: what it reads, what it costs, and that it learns."""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.across import problems_across
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.kl_router import KlRouter, Probe, RouterModel
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.cost import episode_cost
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.shared import SharedStreams
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.reading import Reading
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router import model
from dmr_pipeline.router.calibration import auroc
from dmr_pipeline.router.grpo_trainer import Rollout, RoutingTrainer
from dmr_pipeline.router.kl import train
from dmr_pipeline.router.model import (
    Router,
    load_router,
    new_router,
    routing_margins,
    save_router,
    sequence_of_trajectory,
    with_features,
)
from dmr_pipeline.router.policies import routing_policy
from tests.helpers.grpo_trainer import CHOICES, section, sequences
from tests.helpers.kl_router import expert_episodes, flat
from tests.helpers.one_cache import OneCache
from tests.helpers.probes import PROBE, by_hand, greedy, new_probe, transcripts
from tests.helpers.routers import AGENTS, CPU, ROUTE, ROUTES, TOKENIZER, streams


def play_with(router: Router, slots: int = 3, action: str = "generate", sample: bool = True) -> list[Trajectory]:
    runs = [RolloutRequest(generate_game(number, 50)[0]) for number in range(4)]
    policy, agents = routing_policy(router, slots, sample=sample, seed=5), streams(router.settings.route, slots)
    return play(runs, agents, Prompter.of(TOKENIZER, Prompt()), policy, step_limit=6, action=action)


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_decisions_are_the_heads_on_what_the_cheapest_has_read_and_actions_stay_exact(route: tuple[str, ...]) -> None:
    router = new_probe(route=route, scale=3.0, offsets={"float": 0.1})
    precisions = set()
    for trajectory in play_with(router):
        for turn, (step, prefix) in enumerate(zip(trajectory.steps, transcripts(trajectory), strict=True)):
            features = by_hand(router, prefix, turn)
            assert step.features is not None
            assert step.features.tolist() == pytest.approx(features.tolist(), abs=1e-3)
            with torch.no_grad():
                logits = router.model(features[None])[0].flip(0).numpy()  # dearest first
            shifts = np.array([0.1, *[0.0] * (len(route) - 1)])
            assert step.exceedance == pytest.approx(softmax(3 * logits + shifts).cumsum()[:-1], abs=1e-3)
            assert step.action == greedy(AGENTS[step.precision], prefix)
            assert step.router == Reading(passes=1)
            assert step.besides.keys() == (set() if step.precision == "int2" else {"int2"})
            for reading in step.besides.values():
                assert (reading.passes, reading.cached) == (1, len(prefix))
            precisions.add(step.precision)
    assert precisions == set(route)


def test_slots_do_not_matter_and_the_threshold_decides_where_nothing_is_drawn() -> None:
    router = new_probe(scale=3.0)
    drawn = [[step.action for step in t.steps] for t in play_with(router, slots=4)]
    assert drawn == [[step.action for step in t.steps] for t in play_with(router, slots=1)]
    played = play_with(router, sample=False)
    steps = [step for trajectory in played for step in trajectory.steps]
    assert all((step.precision == "float") == (step.exceedance[0] >= 0.5) for step in steps)


@torch.no_grad()
def test_scored_actions_are_the_likeliest_after_what_was_read() -> None:
    prompter, precisions = Prompter.of(TOKENIZER, Prompt()), set()
    for trajectory in play_with(new_probe(scale=3.0), action="score"):
        episode = trajectory.run.task.episode()
        episode.reset()
        for step, prefix in zip(trajectory.steps, transcripts(trajectory), strict=True):
            model, scores = AGENTS[step.precision], {}
            for command in episode.admissible_commands():
                action = prompter.action(command)
                logits = model(torch.tensor([prefix + action])).logits[0].log_softmax(-1)
                scores[command] = sum(float(logits[len(prefix) - 1 + i, token]) for i, token in enumerate(action))
            assert step.command == max(scores, key=scores.__getitem__)
            episode.step(step.command)
            precisions.add(step.precision)
    assert precisions == set(ROUTE)


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_a_decision_costs_a_pass_of_the_cheapest_where_another_acts_and_the_head(route: tuple[str, ...]) -> None:
    sizes, taken = {"float": 1000, "int4": 300, "int2": 100}, set()
    rungs = {rung: PassBytes(sizes[rung]) for rung in route}
    for trajectory in play_with(new_probe(route=route, scale=3.0)):
        passes = sum(len(s.action) * sizes[s.precision] + 100 * (s.precision != "int2") + 7 for s in trajectory.steps)
        assert episode_cost(trajectory, rungs, 16, PassBytes(7)) == (passes, 0)
        taken |= {step.precision for step in trajectory.steps}
    assert taken == set(route)


@pytest.mark.parametrize("processes", [1, 2])
def test_features_of_whole_sequences_are_those_of_acting(processes: int) -> None:
    router = new_probe(scale=3.0)
    acted = [sequence_of_trajectory(trajectory, router) for trajectory in play_with(router)]
    bare = [replace(sequence, features=None) for sequence in acted]
    told = list[int]()
    read = with_features(router, bare, batch=3, processes=processes, on_progress=told.append)
    assert sum(told) == len(bare) > max(told)
    for sequence, again in zip(acted, read, strict=True):
        assert again.tokens == sequence.tokens
        assert sequence.features is not None
        assert again.features is not None
        torch.testing.assert_close(again.features, sequence.features, atol=1e-3, rtol=1e-3)


def test_states_of_as_many_episodes_are_held_as_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass tells the states of all layers, though the probe looks at one or two."""
    router = new_probe(scale=3.0)
    bare = [replace(sequence_of_trajectory(played, router), features=None) for played in play_with(router)]
    wanted, told = with_features(router, bare, batch=3), list[int]()
    monkeypatch.setattr(model, "_MOST_STATES", 3 * 32 * 4 * 2 * max(len(sequence.tokens) for sequence in bare))
    found = with_features(router, bare, batch=3, on_progress=told.append)
    assert told == [2, 2]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.features, other.features, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_with_one_cache_the_probe_decides_on_what_the_cheapest_has_read_there(route: tuple[str, ...]) -> None:
    router, models = new_probe(route=route, scale=3.0), {rung: AGENTS[rung] for rung in route}
    runs = [RolloutRequest(generate_game(number, 50)[0]) for number in range(4)]
    policy, prompter = routing_policy(router, 3, sample=True, seed=5), Prompter.of(TOKENIZER, Prompt())
    played = play(runs, SharedStreams(PackedStreams, models, 3, 2048), prompter, policy, step_limit=6)
    acted = [sequence_of_trajectory(trajectory, router) for trajectory in played]
    again = with_features(router, [replace(s, features=None) for s in acted], 3, sharing=models)
    apart = False
    for trajectory, found in zip(played, again, strict=True):
        cache = OneCache(AGENTS["int2"])
        for turn, (step, prefix) in enumerate(zip(trajectory.steps, transcripts(trajectory), strict=True)):
            features = cache.features(AGENTS["int2"], prefix, (1, 2), turn)
            apart |= not torch.allclose(features, by_hand(router, prefix, turn), atol=1e-3)
            for its in (torch.from_numpy(step.features), found.features[turn]):
                torch.testing.assert_close(its, features, atol=1e-3, rtol=1e-3)
            if step.precision != "int2":
                cache.see(AGENTS[step.precision], prefix)
                (reading,) = step.besides.values()
                new = len(step.segment) + (turn > 0)
                assert (reading, step.reading.tokens) == (Reading(1, new, len(prefix)), len(step.action))
            cache.read(AGENTS[step.precision], step.action[:-1])
    assert apart
    assert {step.precision for trajectory in played for step in trajectory.steps} == set(route)


def test_standardized_features_have_mean_0_and_deviation_1() -> None:
    router = new_probe()
    features = torch.randn(500, 66) * 7 + 3
    router.model.standardize(features)
    standard = (features - router.model.mean) / router.model.deviation
    torch.testing.assert_close(standard.mean(0), torch.zeros(66), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0), torch.ones(66), atol=1e-3, rtol=0)


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_saved_and_loaded_it_is_the_same_and_holds_nothing_of_the_agent(tmp_path: Path, route: tuple[str, ...]) -> None:
    router = new_probe(3, route, scale=1.5, threshold=0.2)
    router.model.standardize(torch.randn(50, 66) + 2)
    for name in ("one", "two"):
        save_router(router, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    loaded = load_router(tmp_path / "one", CPU, AGENTS["int2"])
    assert loaded.settings == router.settings
    features = torch.randn(9, 66)
    with torch.no_grad():
        assert torch.equal(loaded.model(features), router.model(features))
    # The head, and the means and deviations that its features are standardised by.
    assert loaded.pass_bytes == PassBytes(weights=2 * (66 * 8 + 8 + (8 + 1) * len(route) + 2 * 66))
    with pytest.raises(TypeError, match="needs the cheapest rung's agent"):
        load_router(tmp_path / "one", CPU)


def test_it_depends_on_its_seed_alone() -> None:
    weights = [new_probe(seed).model.inner.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_it_learns_what_the_agent_has_read(tmp_path: Path) -> None:
    router = new_probe()
    sequences, labels = expert_episodes(range(120), router)
    sequences = with_features(router, sequences, batch=8)
    router.model.standardize(torch.cat([s.features for s in sequences if s.features is not None]))
    settings = KlRouter(
        model=PROBE, epochs=40, batch_episodes=4, learning_rate=0.01, validation_games=1, target_ratio=0.3
    )
    before = auroc(flat(routing_margins(router, sequences[100:], 4)), flat(labels[100:]).astype(bool))
    trained, _ = train(router, sequences[:100], labels[:100], settings, tmp_path)
    assert before < 0.6
    assert auroc(flat(routing_margins(trained, sequences[100:], 4)), flat(labels[100:]).astype(bool)) > 0.75


def test_iterations_are_clipped_steps_on_the_same_episodes(tmp_path: Path) -> None:
    """Against a loop of our own: AdamW on min(ratio * A, clip(ratio) * A), the ratio to the policy that sampled."""
    settings = section(iterations=3, clip=0.01, learning_rate=0.01)
    router, other = new_probe(scale=0.7, offsets={"float": -0.2}), new_probe(scale=0.7, offsets={"float": -0.2})
    torch.manual_seed(1)
    played = [
        replace(sequence, features=torch.randn(len(sequence.acted), 66)) for sequence in sequences(router, CHOICES)
    ]
    rewards = [0.9, 0.1, 0.5, 0.2]
    asked: list[int] = []

    def rollouts(update: int, ids: Sequence[str]) -> list[Rollout]:
        asked.append(update)
        return [Rollout(*pair) for pair in zip(played, rewards, strict=True)]

    RoutingTrainer(router, ["a", "b"], rollouts, settings, tmp_path, []).train()
    assert asked == [1]

    features = torch.cat([s.features for s in played if s.features is not None])
    high = torch.tensor([taken == 1 for s in played for taken in s.acted])
    advantages = torch.tensor([0.4] * 2 + [-0.4] * 3 + [0.15] + [-0.15] * 2)
    optimizer = torch.optim.AdamW(other.model.parameters(), lr=0.01, weight_decay=0.0)

    def log_p() -> Tensor:
        logits = other.model(features)
        score = 0.7 * (logits[:, 1] - logits[:, 0]) - 0.2
        return torch.nn.functional.logsigmoid(torch.where(high, score, -score))

    old, clipped = log_p().detach(), 0
    for _ in range(3):
        ratio = (log_p() - old).exp()
        bounded = ratio.clamp(0.99, 1.01)
        clipped += int((bounded != ratio).sum())
        loss = -torch.minimum(ratio * advantages, bounded * advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        optimizer.step()
    assert clipped
    for name, value in router.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_layer_that_the_agent_has_not_is_refused() -> None:
    with pytest.raises(UserError, match=r"probe.layers: \[3\], but the agent has 2"):
        new_router(RouterModel(probe=Probe(layers=(3,))), ROUTE, TOKENIZER, 0, CPU, AGENTS["int2"])


def test_an_agent_whose_text_config_lies_in_another_one_has_probes() -> None:
    agent = copy.copy(AGENTS["int2"])
    text = agent.config
    agent.config = Mock(spec=["get_text_config"], get_text_config=lambda: text)
    router = new_router(RouterModel(probe=Probe(layers=(1, 2))), ROUTE, TOKENIZER, 0, CPU, agent)
    assert router.model.config.state_width == 2 * text.hidden_size


def test_features_are_read_of_episodes_as_long_as_the_agent_has_positions() -> None:
    """The routing tokens are none of its own."""
    models = {rung: AGENTS[rung] for rung in ROUTE}
    router = new_probe(scale=3.0)
    bare = [replace(sequence_of_trajectory(played, router), features=None) for played in play_with(router)]
    wanted = with_features(router, bare, 3, sharing=models)
    longest = max(len(s.tokens) - len(s.positions) for s in bare)
    agents = {rung: copy.copy(agent) for rung, agent in models.items()}
    for agent in agents.values():
        agent.config = copy.copy(agent.config)
        agent.config.max_position_embeddings = longest
    for found, other in zip(with_features(router, bare, 3, sharing=agents), wanted, strict=True):
        torch.testing.assert_close(found.features, other.features)


def test_beta_is_refused() -> None:
    content = load_recipe("alfworld-tiny").model_dump()
    content["grpo_router"]["beta"] = 0.1
    (problem,) = problems_across(dict(Recipe.model_validate(content)))
    assert re.search("grpo_router.beta: .* a probe is not", problem)
