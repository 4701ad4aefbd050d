"""Games written as official files: read back equal, and played alike by the official engine."""

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.official import export
from dmr_pipeline.environments.alfworld.official.engine import OfficialEpisode
from dmr_pipeline.environments.alfworld.official.export import write_game
from dmr_pipeline.environments.alfworld.official.reading import read_game
from dmr_pipeline.environments.alfworld.official.verify import compare, read_walkthrough, replay
from dmr_pipeline.errors import UserError
from tests.helpers import needs
from tests.helpers.games import ODD_GAMES, generated


def written(games: Sequence[Game], folder: Path) -> list[Path]:
    paths = []
    for game in games:
        paths.append(folder / game.task_id / "game.tw-pddl")
        write_game(game, paths[-1])
    return paths


def assert_read_back(game: Game, path: Path) -> None:
    write_game(game, path)
    assert read_game(path).model_copy(update={"task_id": game.task_id}) == game


@needs.official_engine
def test_generated_games_are_read_back_equal(tmp_path: Path) -> None:
    for seed in range(200):
        assert_read_back(generated(seed), tmp_path / "game.tw-pddl")


@needs.official_engine
@needs.official_games
def test_official_games_are_read_back_equal(tmp_path: Path) -> None:
    for path in needs.OFFICIAL_GAMES:
        assert_read_back(read_game(path), tmp_path / "game.tw-pddl")


@needs.official_engine
@pytest.mark.parametrize("game", ODD_GAMES, ids=lambda game: game.task_id)
def test_odd_games_are_read_back_equal(tmp_path: Path, game: Game) -> None:
    assert_read_back(game, tmp_path / "game.tw-pddl")


@needs.official_engine
def test_the_walkthrough_wins_in_our_engine(tmp_path: Path) -> None:
    paths = written([generated(seed) for seed in range(100)], tmp_path)
    assert [one.failure for one in replay(paths) if one.failure] == []
    assert all(json.loads(path.read_text())["solvable"] for path in paths)


@needs.official_engine
def test_a_game_that_the_expert_does_not_win_has_no_walkthrough(tmp_path: Path) -> None:
    game, _ = generate_game(0)
    path = tmp_path / "game.tw-pddl"
    write_game(game.model_copy(update={"may_contain": frozenset(), "things": game.things[:1]}), path)
    assert (read_walkthrough(path), json.loads(path.read_text())["solvable"]) == ([], False)


def test_without_the_official_engine_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dmr-pipeline\[alfworld\]'"):
        write_game(generate_game(0)[0], tmp_path / "game.tw-pddl")


def play_walkthrough(path: Path) -> tuple[float, bool]:
    """The last reward, and whether the episode is over, in the official engine."""
    episode = OfficialEpisode(path)
    episode.first_observation()
    reward, over = 0.0, False
    for command in read_walkthrough(path):
        assert not over
        _, reward, over = episode.step(command)
    return reward, over


def assert_walkthroughs_win(paths: Sequence[Path]) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert set(pool.map(play_walkthrough, paths)) == {(1.0, True)}


def assert_engines_agree(paths: Sequence[Path]) -> None:
    compared = list(compare(paths, steps=40, seed=0, processes=2))
    assert [one.differences for one in compared if one.differences] == []
    assert all(one.steps == 40 for one in compared)


@needs.official_engine
def test_the_official_engine_plays_written_games_alike(tmp_path: Path) -> None:
    # Small rooms: the official engine takes 3-10 s of processor time a kitchen.
    paths = written([generated(seed) for seed in (1, 3, 4, 5)], tmp_path)
    assert_engines_agree([*paths, *written(ODD_GAMES, tmp_path)])
    assert_walkthroughs_win(paths[::2])


@needs.official_engine
@pytest.mark.slow
def test_the_official_engine_plays_many_written_games_alike(tmp_path: Path) -> None:
    paths = written([generated(seed) for seed in range(1000, 1060)], tmp_path)
    assert_engines_agree(paths)
    assert_walkthroughs_win(paths[:20])
