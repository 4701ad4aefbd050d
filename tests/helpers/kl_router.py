"""What tests of stage 1 share: its section, labelled episodes, and the stage run in a folder."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.kl_router import KlRouter, RouterModel
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.router.model import Router, RoutingSequence, routing_sequence
from dmr_pipeline.stages.kl_router import kl_router
from tests.helpers.routers import ARCHITECTURE, TOKENIZER

Labelled = tuple[list[RoutingSequence], list[list[int]]]


def section(model: RouterModel | None = None, **changes: float) -> KlRouter:
    settings = {"epochs": 8, "batch_episodes": 2, "learning_rate": 0.003, "validation_games": 4, "target_ratio": 0.3}
    return KlRouter(model=model or RouterModel(architecture=ARCHITECTURE), **(settings | changes))


def expert_episodes(seeds: Sequence[int], router: Router) -> Labelled:
    """The expert's episodes at random precisions. Sensitive are the steps at which something is seen to be closed."""
    prompter = Prompter.of(TOKENIZER, Prompt(opening="<obs> {observation} <act>", turn="<obs> {observation} <act>"))
    closed = TOKENIZER.convert_tokens_to_ids("closed")
    sequences, labels = [], []
    for seed in seeds:
        game, _ = generate_game(seed, 50)
        episode, expert, rng = AlfWorldEpisode(game), ExploringExpert(game.instruction), random.Random(seed)
        observation = episode.reset()
        expert.observe(None, observation)
        segments, actions = [prompter.opening(observation, game.instruction)], []
        for _ in range(20):
            command = expert.act()
            actions.append(prompter.action(command))
            observation, _, over = episode.step(command)
            if over:
                break
            expert.observe(command, observation)
            segments.append(prompter.turn(observation, game.instruction))
        acted = [rng.choice(router.settings.route) for _ in segments]
        sequences.append(routing_sequence(segments, actions, acted, router.settings))
        labels.append([int(closed in segment) for segment in segments])
    return sequences, labels


def flat(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Of labels, and of the margins of two rungs: one number a step."""
    return np.concatenate([np.ravel(row) for row in rows])


def run_stage(recipe: Recipe, inputs: dict[str, Path], folder: Path) -> tuple[Path, dict[str, object]]:
    output, scratch = folder / "output", folder / "scratch"
    output.mkdir(parents=True)
    scratch.mkdir()
    return output, dict(kl_router(StageContext(recipe, inputs, output, scratch)).summary)
