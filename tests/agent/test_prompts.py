"""Transcripts only grow; an action may hold a thought before its command."""

import pytest

from dmr_pipeline.agent.prompts import Prompter
from dmr_pipeline.agent.vocabulary import word_tokenizer
from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Prompt

TOKENIZER = word_tokenizer(alfworld_texts())


def test_a_thought_is_written_and_is_no_part_of_the_command() -> None:
    thinker = Prompter.of(TOKENIZER, Prompt(thought_end="<do>"))
    action = thinker.action("take mug 1 from cabinet 13", "mug 1")
    assert TOKENIZER.decode(action) == "mug 1 <do> take mug 1 from cabinet 13 <end>"
    assert thinker.command(action) == "take mug 1 from cabinet 13"
    assert thinker.command(action[:-1]) == "take mug 1 from cabinet 13"
    assert thinker.command(TOKENIZER.encode("go to desk 1 <end>")) == "go to desk 1"


def test_without_thoughts_the_action_is_the_command() -> None:
    plain = Prompter.of(TOKENIZER, Prompt())
    assert TOKENIZER.decode(plain.action("look", "mug 1")) == "look <end>"


@pytest.mark.parametrize("prompt", [Prompt(action_end="take mug"), Prompt(thought_end="</think>")])
def test_markers_must_be_single_tokens(prompt: Prompt) -> None:
    with pytest.raises(UserError, match=r"agent\.prompt\.\w+: .* is not a single token"):
        Prompter.of(TOKENIZER, prompt)


def test_the_experts_thought_names_what_its_command_is_about() -> None:
    for seed in range(40):
        game, _ = generate_game(seed)
        episode, expert = AlfWorldEpisode(game), ExploringExpert(game.instruction)
        expert.observe(None, episode.reset())
        over = False
        while not over:
            command, thought = expert.act(), expert.think()
            verb = command.split()[0]
            if thought.endswith(" none"):
                assert verb in ("go", "open", "examine")
            elif verb in ("take", "move", "clean", "heat", "cool", "use"):
                assert thought in command
            observation, _, over = episode.step(command)
            expert.observe(command, observation)
