"""Training sequences: the expert's actions are targets, wherever the transcript allows it."""

import random

from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.agent.examples import IGNORED, Example, ExampleBuilder, expert_example
from dmr_pipeline.agent.prompts import Prompter
from dmr_pipeline.agent.vocabulary import word_tokenizer
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.recipe import Prompt


def prompter() -> Prompter:
    return Prompter.of(word_tokenizer(alfworld_texts()), Prompt())


def taught(example: Example) -> list[list[int]]:
    """Runs of consecutive targets."""
    runs: list[list[int]] = [[]]
    for target in example.targets:
        if target == IGNORED:
            runs.append([])
        else:
            runs[-1].append(target)
    return [run for run in runs if run]


def test_a_flawless_episode_teaches_exactly_the_experts_actions() -> None:
    game, _ = generate_game(5)
    p = prompter()
    example = expert_example(game, p, 50, mistake_rate=0.0, rng=random.Random(0))
    actions = taught(example)
    assert len(actions) == example.steps
    assert all(action[-1] == p.end_token for action in actions)
    assert p.command(actions[0]).startswith("go to ")
    for i, target in enumerate(example.targets):
        if target != IGNORED:
            assert target == example.tokens[i + 1]


def test_a_mistake_is_not_taught_but_the_step_after_it_is() -> None:
    builder = ExampleBuilder()
    builder.step([1, 2], taken=[7, 8, 9], expert=[7, 5, 9])
    builder.step([3], taken=[6, 9], expert=[6, 9])
    assert builder.tokens == [1, 2, 7, 8, 9, 3, 6, 9]
    #                         .  7  5  .  .  6  9  .
    assert builder.targets == [IGNORED, 7, 5, IGNORED, IGNORED, 6, 9, IGNORED]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_targets_are_the_experts_tokens_up_to_the_first_difference(taken: list[int], expert: list[int]) -> None:
    builder = ExampleBuilder()
    builder.step([0], taken, expert)
    assert len(builder.targets) == len(builder.tokens)
    shared = next(
        (i for i, (a, b) in enumerate(zip(taken, expert, strict=False)) if a != b), min(len(taken), len(expert))
    )
    wanted = expert[: shared + 1]
    got = [target for target in builder.targets if target != IGNORED]
    assert got == wanted[: len(taken)]


def test_the_tokenizer_knows_every_word_and_gives_commands_back() -> None:
    p = prompter()
    unknown = p.tokenizer.unk_token_id
    for seed in range(30):
        game, _ = generate_game(seed)
        example = expert_example(game, p, 50, mistake_rate=0.3, rng=random.Random(seed))
        assert unknown not in example.tokens
    for command in ("take mug 1 from cabinet 13", "move soapbar 2 to toilet 1", "heat egg 1 with microwave 1", "look"):
        assert p.command(p.action(command)) == command
