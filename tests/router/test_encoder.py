"""The encoder router: what it reads, against a second implementation, and that it learns, alike in any batch."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.across import problems_across
from dmr_pipeline.recipe.kl_router import Encoder, KlRouter, RouterModel
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.reading import Reading
from dmr_pipeline.router.calibration import auroc
from dmr_pipeline.router.encoder import TrajectoryEncoder
from dmr_pipeline.router.grpo_trainer import Rollout, RoutingTrainer
from dmr_pipeline.router.kl import train, with_settings
from dmr_pipeline.router.model import (
    Router,
    load_router,
    new_router,
    routing_margins,
    save_router,
    sequence_of_trajectory,
)
from dmr_pipeline.router.policies import routing_policy
from tests.helpers.grpo_trainer import CHOICES, section, sequences
from tests.helpers.kl_router import expert_episodes, flat, run_stage
from tests.helpers.kl_router import section as kl_section
from tests.helpers.rollouts import PROMPTER, ROUTE, RUNS, THREE, roll, taken
from tests.helpers.routers import CPU, TOKENIZER

SMALL = RouterModel(encoder=Encoder(width=16, heads=2, feed_forward=24, window=24))


def new(route: Sequence[str] = ROUTE, tokenizer=PROMPTER.tokenizer, seed: int = 0, **settings: object) -> Router:
    router = new_router(SMALL, route, tokenizer, seed, CPU)
    return with_settings(replace(router, model=router.model.eval()), **settings)


@torch.no_grad()
def by_hand(model: TrajectoryEncoder, window: Sequence[int]) -> Tensor:
    """Logits [rungs] of one window: layers with the norm first, attention over all of it, GELU."""
    weights = model.state_dict()

    def linear(x: Tensor, name: str, bias: str | None = None) -> Tensor:
        return x @ weights[f"{name}weight" if bias is None else name].T + weights[bias or f"{name}bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    size, width, heads = len(window), model.config.width, model.config.heads
    x = weights["tokens.weight"][list(window)] + weights["places.weight"][list(range(size - 1, -1, -1))]
    for layer in range(model.config.layers):
        at = f"encoder.layers.{layer}"
        joint = linear(norm(x, f"{at}.norm1"), f"{at}.self_attn.in_proj_weight", f"{at}.self_attn.in_proj_bias")
        q, k, v = (part.view(size, heads, -1).transpose(0, 1) for part in joint.split(width, dim=-1))
        seen = (q @ k.transpose(1, 2) / (width // heads) ** 0.5).softmax(-1) @ v
        x = x + linear(seen.transpose(0, 1).reshape(size, width), f"{at}.self_attn.out_proj.")
        inner = torch.nn.functional.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.linear1."))
        x = x + linear(inner, f"{at}.linear2.")
    return linear(norm(x, "encoder.norm")[-1], "head.")


def test_of_a_long_transcript_the_beginning_and_the_end_are_read() -> None:
    model = new().model
    assert model.window_of(list(range(24))) == list(range(24))
    assert model.window_of(list(range(100))) == [*range(12), *range(88, 100)]
    odd = new_router(RouterModel(encoder=Encoder(window=5)), ROUTE, TOKENIZER, 0, CPU).model
    assert odd.window_of(list(range(9))) == [0, 1, 6, 7, 8]


@pytest.mark.parametrize("route", [ROUTE, THREE], ids=len)
def test_decisions_are_those_of_plain_passes_over_the_window_in_any_batch(route: Sequence[str]) -> None:
    router = new(route, scale=20.0)
    some = [
        sequence_of_trajectory(its, router) for its in roll(routing_policy(router, 2), 2, route=route, runs=RUNS[:2])
    ]
    level = 20 * np.median(np.concatenate(routing_margins(router, some, 2)), axis=0)
    router = with_settings(router, offsets=router.settings.named((-level).tolist()))  # so that every rung acts
    played = [
        roll(routing_policy(router, slots, sample=True, seed=2), slots, route=route, runs=RUNS[:4]) for slots in (4, 1)
    ]
    assert taken(played[0]) == taken(played[1])
    model, acted = router.model, set()
    for trajectory in played[0]:
        sequence = sequence_of_trajectory(trajectory, router)
        for step, place in zip(trajectory.steps, sequence.positions, strict=True):
            window = model.window_of(sequence.tokens[: place + 1])
            logits = by_hand(model, window)
            levels = router.settings.exceedance(logits[None])[0]
            assert step.exceedance == pytest.approx(levels.tolist(), abs=1e-4)
            assert step.router == Reading(1, len(window))
            acted.add(step.precision)
        (margins,) = routing_margins(router, [sequence], 1)
        assert margins.shape == (len(trajectory.steps), len(route) - 1)
    assert acted == set(route)


def test_what_comes_last_changes_how_the_first_token_is_read() -> None:
    """No causal mask: the first layer's state of the first token depends on the last one."""
    model = new().model

    def first(window: Sequence[int]) -> Tensor:
        found: list[Tensor] = []
        hook = model.encoder.register_forward_hook(lambda *parts: found.append(parts[2][0, 0]))
        with torch.no_grad():
            model([window])
        hook.remove()
        return found[0]

    assert not torch.allclose(first([5, 6, 7]), first([5, 6, 8]), atol=1e-4)


def test_layers_begin_differently_and_the_seed_decides() -> None:
    one, same, other = (dict(new(seed=seed).model.named_parameters()) for seed in (0, 0, 1))
    for name, weights in one.items():
        assert torch.equal(weights, same[name])
        if weights.ndim > 1:
            assert not torch.equal(weights, other[name])
    name = "encoder.layers.{}.linear1.weight"
    assert not torch.equal(one[name.format(0)], one[name.format(1)])


def test_saved_and_loaded_it_is_the_same_and_needs_no_agent(tmp_path: Path) -> None:
    router = new(THREE, scale=1.5, threshold=0.2)
    for name in ("one", "two"):
        save_router(router, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.suffix in (".json", ".safetensors", ".jinja", ".txt")
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    loaded = load_router(tmp_path / "one", CPU)
    assert loaded.settings == router.settings
    with torch.no_grad():
        assert torch.equal(loaded.model([[1, 2, 3]]), router.model([[1, 2, 3]]))
    layer = 4 * 16 * 16 + 4 * 16 + 2 * 16 * 24 + 24 + 16 + 4 * 16
    assert loaded.pass_bytes == PassBytes(weights=2 * (2 * layer + 2 * 16 + 3 * 16 + 3), embedding_row=2 * 2 * 16)


def test_it_learns_what_it_reads(tmp_path: Path) -> None:
    router = new(tokenizer=TOKENIZER)
    learned, labels = expert_episodes(range(40), router)
    settings = KlRouter(
        model=SMALL, epochs=8, batch_episodes=4, learning_rate=0.01, validation_games=1, target_ratio=0.3
    )
    trained, log = train(router, learned[:32], labels[:32], settings, tmp_path)
    assert log["loss"].tail(8).mean() < 0.8 * log["loss"].head(8).mean()  # type: ignore[operator]
    assert auroc(flat(routing_margins(trained, learned[32:], 4)), flat(labels[32:]).astype(bool)) > 0.75


def test_stage_2_goes_on_from_it(tmp_path: Path) -> None:
    """The first of several steps is along the gradient of advantage times log-probability."""
    router, other = new(tokenizer=TOKENIZER, scale=0.7), new(tokenizer=TOKENIZER, scale=0.7)
    played, rewards = sequences(router, CHOICES), [0.9, 0.1, 0.5, 0.2]

    def rollouts(update: int, ids: Sequence[str]) -> list[Rollout]:
        return [Rollout(*pair) for pair in zip(played, rewards, strict=True)]

    RoutingTrainer(router, ["a", "b"], rollouts, section(iterations=1, learning_rate=0.01), tmp_path, []).train()
    high = torch.tensor([place == 1 for s in played for place in s.acted])
    advantages = torch.tensor([0.4] * 2 + [-0.4] * 3 + [0.15] + [-0.15] * 2)
    windows = [other.model.window_of(s.tokens[: place + 1]) for s in played for place in s.positions]
    optimizer = torch.optim.AdamW(other.model.parameters(), lr=0.01, weight_decay=0.0)
    logits = other.model.train()(windows)
    score = 0.7 * (logits[:, 1] - logits[:, 0])
    (-torch.nn.functional.logsigmoid(torch.where(high, score, -score)) * advantages).mean().backward()
    torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
    optimizer.step()
    moved = dict(new(tokenizer=TOKENIZER).model.named_parameters())
    for name, value in router.model.state_dict().items():
        expected = other.model.state_dict()[name]
        near = (value - expected).abs() < 2e-3  # Adam's first step is a sign: where a gradient is about 0, either way
        assert near.float().mean() > 0.95, name
        assert not torch.equal(value, moved[name])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads: 3 do not divide the width, 64"):
        Encoder(heads=3)
    with pytest.raises(ValidationError, match="give exactly one of"):
        RouterModel(encoder=Encoder(), probe=load_recipe("alfworld-tiny").kl_router.model.probe)
    content = load_recipe("alfworld-tiny").model_dump()
    content["kl_router"]["model"] = {"encoder": {}}
    content["grpo_router"]["beta"] = 0.1
    (problem,) = problems_across(dict(Recipe.model_validate(content)))
    assert re.search(r"grpo_router\.beta: .* an encoder is not", problem)
    assert "encoder" not in load_recipe("alfworld-tiny").kl_router.model.model_dump()


def test_the_stage_trains_it(recipe: Recipe, inputs: dict[str, Path], tmp_path: Path) -> None:
    changed = recipe.model_copy(update={"kl_router": kl_section(SMALL, epochs=1)})
    output, summary = run_stage(changed, inputs, tmp_path)
    router = load_router(output / "router", CPU)
    assert router.settings.kind == "encoder"
    assert router.parameters == summary["parameters"]
    assert 0 <= float(str(summary["auroc"])) <= 1
