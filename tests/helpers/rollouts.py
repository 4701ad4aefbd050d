"""Two random agents that act at high and at low precision, a few games, and what they must do by plain forward passes."""

import copy
from dataclasses import replace

import torch

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.recipe import Architecture, Prompt
from dmr_pipeline.rollout.engine import (
    Run,
    Trajectory,
    play,
)
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.training.train import new_model
from dmr_pipeline.training.vocabulary import word_tokenizer

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


def roll(policy, slots=7, action="generate", temperature=0.0, seed=0, runs=RUNS, known=None) -> list[Trajectory]:
    agents = {True: Streams(HIGH, slots, 2048), False: Streams(LOW, slots, 2048)}
    return play(runs, agents, PROMPTER, policy, STEPS, action, temperature, seed, known=known)


def but_for_rounding(played: list[Trajectory]) -> list[Trajectory]:
    """The same episodes, the policy's probabilities in full thousandths."""
    return [replace(t, steps=[replace(s, probability=round(s.probability, 3)) for s in t.steps]) for t in played]


def taken(played: list[Trajectory]) -> list[list[list[int]]]:
    return [[step.action for step in trajectory.steps] for trajectory in played]


def transcript(trajectory: Trajectory, turn: int) -> list[int]:
    before = [step.segment + step.action for step in trajectory.steps[:turn]]
    return [token for part in before for token in part] + trajectory.steps[turn].segment


@torch.no_grad()
def greedy_uncached(model, prefix: list[int]) -> list[int]:
    action: list[int] = []
    while len(action) < 6 and (not action or action[-1] != PROMPTER.action_end.token):
        logits = model(torch.tensor([prefix + action])).logits[0, -1]
        action.append(int(logits.argmax()))
    return action
