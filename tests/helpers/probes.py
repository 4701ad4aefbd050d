"""Probes on two random agents, and what they must see by plain forward passes."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dmr_pipeline.recipe import Probe, Prompt, RouterModel
from dmr_pipeline.rollout.engine import Trajectory
from dmr_pipeline.router.model import (
    Router,
    new_router,
)
from tests.helpers.routers import CPU, TOKENIZER, random_model

PROBE = RouterModel(probe=Probe(layers=(1, 2), hidden=8))
LOW, HIGH = random_model(0), random_model(1)


def new_probe(seed: int = 0, **settings: float) -> Router:
    router = new_router(PROBE, TOKENIZER, seed, CPU, LOW)
    return replace(router, settings=router.settings.model_copy(update=settings))


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
    states = LOW(torch.tensor([prefix]), output_hidden_states=True).hidden_states
    layers = [states[layer][0, -1] for layer in (1, 2)]
    return torch.cat([*layers, torch.tensor([turn / 10, np.log1p(turn)], dtype=torch.float32)])


@torch.no_grad()
def greedy(model: torch.nn.Module, prefix: list[int]) -> list[int]:
    prompt, action = Prompt(), list[int]()
    end = TOKENIZER.convert_tokens_to_ids(prompt.action_end)
    while len(action) < prompt.max_action_tokens and end not in action:
        action.append(int(model(torch.tensor([prefix + action])).logits[0, -1].argmax()))
    return action
