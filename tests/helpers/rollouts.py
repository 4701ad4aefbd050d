"""Random agents that act as rungs of a ladder, a few games, and what they must do by plain forward passes."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.precision.acting import ActingModels
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.model import Architecture
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
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
    MIDDLE = copy.deepcopy(HIGH)
    for parameter in MIDDLE.parameters():
        parameter += 0.005 * torch.randn_like(parameter)
PASSES = {"float": PassBytes(8), "int4": PassBytes(4), "int2": PassBytes(2)}
MODELS = {"float": HIGH, "int4": MIDDLE, "int2": LOW}
ROUTE = ("float", "int2")
THREE = ("float", "int4", "int2")
ALL_HIGH, ALL_LOW = (SinglePrecision(rung, ROUTE) for rung in ROUTE)
HALF = dict.fromkeys(ROUTE, 0.5)
"""Shares of random mixing."""
RUNS = [RolloutRequest(generate_game(seed)[0]) for seed in range(7)]
STEPS = 6


def streams_of(rungs: Sequence[str], slots: int) -> dict[str, Streams]:
    return {rung: Streams(MODELS[rung], slots, 2048) for rung in rungs}


def roll(
    policy, slots=7, action="generate", temperature=0.0, seed=0, runs=RUNS, known=None, route=ROUTE
) -> list[Trajectory]:
    return play(runs, streams_of(route, slots), PROMPTER, policy, STEPS, action, temperature, seed, known=known)


def rollouts_of(rungs: Sequence[str]) -> Rollouts:
    """These models as `Rollouts.load` would hold them, in one process."""
    models = {rung: MODELS[rung] for rung in rungs}
    return Rollouts(
        ActingModels(models, {rung: PASSES[rung] for rung in rungs}, torch.device("cpu")),
        PROMPTER,
        unit_bytes=1.0,
        cache_bits=16,
        step_limit=STEPS,
        action="generate",
        temperature=0.0,
        capacity=2048,
        batch_episodes=64,
        processes=1,
        reuse_actions=True,
        speculative=None,
    )


def but_for_rounding(played: list[Trajectory]) -> list[Trajectory]:
    """The same episodes, the policy's probabilities in full thousandths."""

    def rounded(levels: Sequence[float]) -> tuple[float, ...]:
        return tuple(round(level, 3) for level in levels)

    return [replace(t, steps=[replace(s, exceedance=rounded(s.exceedance)) for s in t.steps]) for t in played]


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


def passes_over(prefix: list[int], action: list[int]) -> int:
    """Tokens whose keys and values are read where each token of an action takes a pass over all that is before it."""
    return sum(len(prefix + action[:i]) for i in range(len(action)))
