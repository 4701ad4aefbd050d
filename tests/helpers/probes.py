"""Probes on random agents, and what they must see by plain forward passes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.kl_router import Probe, RouterModel
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.router.kl import with_settings
from dmr_pipeline.router.model import Router, new_router
from tests.helpers.routers import AGENTS, CPU, ROUTE, TOKENIZER

PROBE = RouterModel(probe=Probe(layers=(1, 2), hidden=8))


def new_probe(seed: int = 0, route: Sequence[str] = ROUTE, **settings: Any) -> Router:
    return with_settings(new_router(PROBE, route, TOKENIZER, seed, CPU, AGENTS[route[-1]]), **settings)


def transcripts(trajectory: Trajectory) -> list[list[int]]:
    """What the agent has read before each action."""
    prefixes: list[list[int]] = []
    for step in trajectory.steps:
        before = prefixes[-1] + trajectory.steps[len(prefixes) - 1].action if prefixes else []
        prefixes.append(before + step.segment)
    return prefixes


@torch.no_grad()
def by_hand(router: Router, prefix: list[int], turn: int) -> Tensor:
    """Features from one plain forward pass over the whole transcript."""
    assert router.agent is not None
    states = router.agent(torch.tensor([prefix]), output_hidden_states=True).hidden_states
    layers = [states[layer][0, -1] for layer in (1, 2)]
    return torch.cat([*layers, torch.tensor([turn / 10, np.log1p(turn)], dtype=torch.float32)])


@torch.no_grad()
def greedy(model: torch.nn.Module, prefix: list[int]) -> list[int]:
    prompt, action = Prompt(), list[int]()
    end = TOKENIZER.convert_tokens_to_ids(prompt.action_end)
    while len(action) < prompt.max_action_tokens and end not in action:
        action.append(int(model(torch.tensor([prefix + action])).logits[0, -1].argmax()))
    return action
