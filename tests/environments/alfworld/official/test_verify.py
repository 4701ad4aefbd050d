"""The checks of the engine find what is wrong; and, where the official engine is installed, find nothing."""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmr_pipeline.cli import app
from dmr_pipeline.environments.alfworld import bench
from dmr_pipeline.environments.alfworld.engine import NOTHING, AlfWorldEpisode
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.official import engine, verify
from dmr_pipeline.environments.alfworld.official.reading import read_game
from dmr_pipeline.environments.alfworld.store import to_json
from dmr_pipeline.errors import UserError
from tests.helpers import needs

PROBLEM = """(define (problem p) (:objects)
(:init (receptacleType Desk_bar_1 DeskType) (receptacleType Bed_bar_1 BedType)
(receptacleAtLocation Desk_bar_1 loc_1) (receptacleAtLocation Bed_bar_1 loc_2)
(objectType Book_bar_1 BookType) (inReceptacle Book_bar_1 Bed_bar_1) (pickupable Book_bar_1)
(objectAtLocation Book_bar_1 loc_2) (canContain DeskType BookType) (canContain BedType BookType))
(:goal (and (exists (?r - receptacle) (exists (?o - object)
 (and (inReceptacle ?o ?r) (objectType ?o BookType) (receptacleType ?r DeskType)))))))"""
WALKTHROUGH = ["go to bed 1", "take book 1 from bed 1", "go to desk 1", "move book 1 to desk 1"]


def write(folder: Path, walkthrough: list[str] | None) -> Path:
    folder.mkdir(parents=True)
    path = folder / "game.tw-pddl"
    content = {"pddl_problem": PROBLEM, "grammar": '"rhs": "Your task is to: put a book in desk."'}
    path.write_text(json.dumps(content | ({} if walkthrough is None else {"walkthrough": walkthrough})))
    return path


@pytest.mark.parametrize(
    ("walkthrough", "failure"),
    [
        (WALKTHROUGH, None),
        (WALKTHROUGH[:3], "not won at its end"),
        ([*WALKTHROUGH, "look"], "won 1 steps early"),
        (["look", "open bed 1"], "step 2, 'open bed 1': not admissible"),
        ([], "the file has no walkthrough"),
        (None, "the file has no walkthrough"),
    ],
)
def test_a_walkthrough_wins_with_its_last_command(
    tmp_path: Path, walkthrough: list[str] | None, failure: str | None
) -> None:
    path = write(tmp_path / "task" / "trial", walkthrough)
    assert list(verify.replay([path])) == [verify.Replay(path, failure)]


def test_the_command_counts_and_exits_with_1_where_one_fails(tmp_path: Path) -> None:
    write(tmp_path / "good" / "trial", WALKTHROUGH)
    result = CliRunner().invoke(app, ["env", "verify", "alfworld", "--games", str(tmp_path)])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "games 1 won 1 failed 0")
    write(tmp_path / "bad" / "trial", WALKTHROUGH[:2])
    result = CliRunner().invoke(app, ["env", "verify", "alfworld", "--games", str(tmp_path)])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "games 2 won 1 failed 1")
    assert "bad/trial/game.tw-pddl: not won at its end" in result.stdout


def test_without_games_the_command_exits_with_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["env", "verify", "alfworld", "--games", str(tmp_path)])
    assert result.exit_code == 2
    assert "no game.tw-pddl below it" in result.stderr


class _Copy(AlfWorldEpisode):
    """Stands for the official engine."""

    def __init__(self, path: Path) -> None:
        super().__init__(read_game(path))


class _OtherWelcome(_Copy):
    def first_observation(self) -> str:
        return super().first_observation() + " "


class _OtherText(_Copy):
    def step(self, command: str) -> tuple[str, float, bool]:
        observation, reward, done = super().step(command)
        return observation.replace("On the desk", "Upon the desk"), reward, done


class _OtherCommands(_Copy):
    def admissible_commands(self) -> list[str]:
        return [command for command in super().admissible_commands() if not command.startswith("take")]


class _OtherReward(_Copy):
    def step(self, command: str) -> tuple[str, float, bool]:
        observation, reward, done = super().step(command)
        return observation, reward / 2, done


class _NeverDone(_Copy):
    def step(self, command: str) -> tuple[str, float, bool]:
        return (*super().step(command)[:2], False)


@pytest.mark.parametrize(
    ("engine", "difference"),
    [
        (_Copy, None),
        (_OtherWelcome, "the first observation: official"),
        (_OtherText, "observation: official 'You arrive at desk 1. Upon the desk"),
        (_OtherCommands, "admissible commands: only official [], only ours ['take book 1 from bed 1']"),
        (_OtherReward, "reward: official 0.5, ours 1.0"),
        (_NeverDone, "done: official False, ours True"),
    ],
)
def test_every_kind_of_difference_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Callable[[Path], AlfWorldEpisode], difference: str | None
) -> None:
    path = write(tmp_path / "task" / "trial", WALKTHROUGH)
    monkeypatch.setattr(verify, "OfficialEpisode", engine)
    found = [verify.compare_game(path, steps=60, seed=seed) for seed in range(4)]
    if difference is None:
        assert all(comparison.differences == () and comparison.steps == 60 for comparison in found)
    else:
        assert any(comparison.differences and comparison.differences[0].startswith(difference) for comparison in found)


def test_walks_try_every_verb_win_and_do_what_does_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else a rule could differ and never be asked."""
    said: Counter[str] = Counter()

    class Listening(_Copy):
        def __init__(self, path: Path) -> None:
            AlfWorldEpisode.__init__(self, generate_game(int(path.name))[0])

        def step(self, command: str) -> tuple[str, float, bool]:
            observation, reward, done = super().step(command)
            said[NOTHING if observation == NOTHING else command.split()[0]] += 1
            said["won"] += done
            return observation, reward, done

    monkeypatch.setattr(verify, "OfficialEpisode", Listening)
    monkeypatch.setattr(verify, "read_game", lambda path: generate_game(int(path.name))[0])
    monkeypatch.setattr(verify, "read_walkthrough", lambda _: [])
    for seed in range(40):
        verify.compare_game(tmp_path / str(seed), steps=60, seed=0)
    verbs = {"look", "inventory", "help", "go", "examine", "open", "close", "take", "move", "use", "slice"}
    verbs |= {"clean", "heat", "cool"}
    assert not [verb for verb in verbs if said[verb] < 5], said
    assert 0.1 < said[NOTHING] / 2400 < 0.25


def test_the_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'dmr-pipeline\[alfworld\]'"):
        engine.OfficialEpisode(tmp_path / "game.tw-pddl")


@needs.official_engine
@needs.official_games
def test_a_sample_of_official_games_is_equal_in_the_official_engine() -> None:
    paths = random.Random(0).sample(verify.game_files(needs.OFFICIAL_GAMES[0].parents[3]), 40)
    assert [c for c in verify.compare(paths, steps=60, seed=0, processes=2) if c.differences] == []


@needs.official_engine
@needs.official_games
@pytest.mark.slow
def test_every_official_game_is_equal_in_the_official_engine() -> None:
    """Hours."""
    paths = verify.game_files(needs.OFFICIAL_GAMES[0].parents[3])
    for comparison in verify.compare(paths, steps=20, seed=1, processes=2):
        assert comparison.differences == (), comparison.path


def test_the_bench_times_what_it_says(tmp_path: Path) -> None:
    path = write(tmp_path / "task" / "trial", WALKTHROUGH)
    ((ours, official),) = bench.timings([path], steps=20, official=False)
    assert official is None
    assert 0 < ours.step < ours.load < 0.1
    packed = [to_json(generate_game(seed)[0]) for seed in range(5)]
    few, many = bench.memory_bytes(packed, 20), bench.memory_bytes(packed, 600)
    assert 5e6 < many < 200e6
    assert few < many / 5
    assert bench.steps_a_second([read_game(path)], 3) > 1000


def test_the_bench_command_prints_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "task" / "trial", WALKTHROUGH)
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["bench", "env", "--games", str(tmp_path), "--sample", "1", "--steps", "5"])
    assert result.exit_code == 0, result.output
    for words in ("load a game file", "reset", "step", "load a packed game", "left out", "1,000 live environments"):
        assert words in result.stdout
    assert result.stdout.count("steps a second") == 4
    sys.stderr.write("left out of this test: the official engine (dmr bench env shows it)\n")


def test_experts_and_comparison_of_packed_games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tmp_path / "games" / "json_2.1.1" / "train" / "pick_and_place_simple-Book-None-Desk-301" / "trial"
    path = write(trial, WALKTHROUGH)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"solvable": True}))
    monkeypatch.chdir(tmp_path)
    for command, shown in (
        (["data", "alfworld", "--from", "games"], ["1 games, but the official split has 3553"]),
        (
            ["env", "experts", "alfworld", "--split", "train"],
            ["exploring expert: 1 of 1 won", "planner: 1 of 1 won, 4.0 steps on average, 1 plans proven shortest"],
        ),
        (
            ["env", "compare", "alfworld", "--generated", "30"],
            ["1 official games, 30 generated", "shortest plan", "put a {thing} in {target}"],
        ),
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        for words in shown:
            assert words in result.stdout
