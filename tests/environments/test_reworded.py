"""Games in other words: the same things are listed, the same commands do the same."""

import re
from dataclasses import replace

import pytest

from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.reworded import RewordedTask, reworded

ROOM = "Looking quickly around you, you see a bed 1, a desk 2, a shelf 1, and a drawer 1."


def test_lists_keep_their_items_and_come_in_an_order_that_the_seed_decides() -> None:
    texts = {reworded(ROOM, seed) for seed in range(30)}
    assert len(texts) > 10
    for text in texts:
        assert sorted(re.findall(r"a \w+ \d", text)) == sorted(re.findall(r"a \w+ \d", ROOM))
        assert re.sub(r"a \w+ \d", "X", text) == re.sub(r"a \w+ \d", "X", ROOM)
    assert reworded(ROOM, 3) == reworded(ROOM, 3)


@pytest.mark.parametrize(
    "text", ["Nothing happens.", "On the shelf 1, you see nothing.", "On the bed 1, you see a mug 1."]
)
def test_what_lists_less_than_two_stays_as_it_is(text: str) -> None:
    assert reworded(text, 1) == text


def test_an_episode_goes_as_before() -> None:
    differed = False
    for number in range(5):
        game = generate_game(number)[0]
        plain, other = game.episode(), RewordedTask(game, seed=7).episode()
        observation, told = plain.reset(), other.reset()
        expert = ExploringExpert(game.instruction)
        expert.observe(None, observation)
        for _ in range(30):
            assert sorted(re.findall(r"\w+", told)) == sorted(re.findall(r"\w+", observation))
            differed |= told != observation
            assert other.admissible_commands() == plain.admissible_commands()
            assert other.state == plain.state
            command = expert.act()
            (observation, *rest), (told, *others) = plain.step(command), other.step(command)
            assert rest == others
            if rest[1]:
                break
            expert.observe(command, observation)
    assert differed


def test_its_task_is_the_same_game() -> None:
    game = generate_game(0)[0]
    task = RewordedTask(game, 1)
    assert (task.task_id, task.task_type, task.instruction) == (game.task_id, game.task_type, game.instruction)
    assert task.episode().reset() == replace(task).episode().reset()
    plain = game.episode().first_observation()
    assert len(task.episode().first_observation()) == len(plain)
