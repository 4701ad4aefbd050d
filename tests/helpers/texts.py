"""Texts of transcripts: an expert's episode, and what a model has written."""

from collections.abc import Iterator

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.rollout.prompts import Prompter


def generated(p: Prompter, text: str) -> list[int]:
    """A text as the model wrote it."""
    return p.tokenizer.encode(text, add_special_tokens=False)


def episode_texts(seed: int) -> Iterator[tuple[str, str, str, str]]:
    """Observation, task, command and thought of each step of an expert's episode."""
    game, _ = generate_game(seed)
    episode, expert = AlfWorldEpisode(game), ExploringExpert(game.instruction)
    observation, over, command = episode.reset(), False, None
    while not over:
        expert.observe(command, observation)
        command = expert.act()
        yield observation, game.instruction, command, expert.think()
        observation, _, over = episode.step(command)
