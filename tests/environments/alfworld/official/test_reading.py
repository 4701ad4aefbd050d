"""Official games, where `$ALFWORLD_DATA` has them."""

import json
from pathlib import Path

import pytest

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.generator import expert_wins
from dmr_pipeline.environments.alfworld.household import count_household, household
from dmr_pipeline.environments.alfworld.official.reading import read_game
from dmr_pipeline.errors import UserError
from tests.helpers import needs
from tests.helpers.games import PROBLEM


@needs.official_games
def test_walkthroughs_of_official_games_win() -> None:
    won = 0
    for path in needs.OFFICIAL_GAMES:
        episode, over = AlfWorldEpisode(read_game(path)), False
        for command in json.loads(path.read_text())["walkthrough"]:
            _, _, over = episode.step(command)
        won += over
    assert won == len(needs.OFFICIAL_GAMES)


@needs.official_games
def test_the_exploring_expert_wins_official_games() -> None:
    won = sum(expert_wins(read_game(path), 50) for path in needs.OFFICIAL_GAMES)
    assert won >= 0.95 * len(needs.OFFICIAL_GAMES)


@needs.official_games
def test_the_household_was_counted_over_the_official_train_split() -> None:
    train = sorted((needs.OFFICIAL_GAMES[0].parents[3] / "train").glob("*/*/game.tw-pddl"))
    assert count_household(read_game(path) for path in train) == household()


@pytest.mark.parametrize(
    ("template", "command"),
    [("move {o} to {r}", "move book 1 to desk 1"), ("put {o} in/on {r}", "put book 1 in/on desk 1")],
)
def test_an_official_file_of_either_grammar(tmp_path: Path, template: str, command: str) -> None:
    folder = tmp_path / "pick" / "trial"
    folder.mkdir(parents=True)
    grammar = f'"rhs": "Your task is to: put a book in desk."  template :: "{template}";'
    (folder / "game.tw-pddl").write_text(json.dumps({"pddl_problem": PROBLEM, "grammar": grammar}))
    game = read_game(folder / "game.tw-pddl")
    assert (game.task_id, game.instruction) == ("pick/trial", "put a book in desk")
    episode = AlfWorldEpisode(game)
    for step in ("go to bed 1", "take book 1 from bed 1", "go to desk 1"):
        assert not episode.step(step)[2]
    assert episode.step(command)[2]


@pytest.mark.parametrize("content", ["", "{}", '{"pddl_problem": "(:init)", "grammar": ""}', "[1]"])
def test_a_malformed_game_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "game.tw-pddl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"game\.tw-pddl: not an ALFWorld game"):
        read_game(path)
