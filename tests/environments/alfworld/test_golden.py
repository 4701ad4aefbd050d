"""Episodes that the official engine played on games of ours: compared everywhere, the official engine installed or not.

`python -m tests.environments.alfworld.test_golden` records them anew where it is installed.
"""

import hashlib
import json
import multiprocessing
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.game import Game, Thing
from dmr_pipeline.environments.alfworld.official import verify
from dmr_pipeline.environments.alfworld.official.engine import OfficialEpisode
from dmr_pipeline.environments.alfworld.official.export import write_game
from dmr_pipeline.environments.alfworld.store import to_json
from tests.helpers.games import ODD_GAMES, generated

RECORD = Path(__file__).with_name("official_engine.json")
EPISODES: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else []
STEPS = 60
_LAMP = Thing(name="desklamp 1", kind="desklamp", inside=(2,), abilities=frozenset({"pickupable", "toggleable"}))
LAMP = ODD_GAMES[0].model_copy(update={"task_id": "odd/lamp", "things": (*ODD_GAMES[0].things, _LAMP)})
"""Official lamps can't be picked up, and so not examined."""
SELDOM = {
    "odd/game": [
        "go to desk 3",
        "take knife 2 from desk 3",
        "open desk 1",
        "move knife 2 to desk 1",
        "look",
        "go to bathtubbasin 1",
        "take mug 9 from bathtubbasin 1",
        "examine mug 9",
    ],
    "odd/lamp": ["go to desk 1", "use desklamp 1", "open desk 1", "take desklamp 1 from desk 1", "examine desklamp 1"],
}
"""Task id -> what random walks seldom come to: a thing moved between receptacles of one place, one that started cool, a lamp
in hand."""


def digest(commands: list[str]) -> str:
    return hashlib.sha256("\n".join(commands).encode()).hexdigest()[:16]


@pytest.mark.parametrize("recorded", EPISODES, ids=lambda recorded: recorded["game"]["task_id"])
def test_a_recorded_episode_is_played_alike(recorded: dict[str, Any]) -> None:
    episode = AlfWorldEpisode(Game.model_validate(recorded["game"]))
    assert episode.first_observation() == recorded["first_observation"]
    assert digest(episode.admissible_commands()) == recorded["admissible"]
    for command, observation, reward, done, admissible in recorded["steps"]:
        assert episode.step(command) == (observation, reward, done), command
        assert digest(episode.admissible_commands()) == admissible, command


def test_the_record_holds_what_matters() -> None:
    said = {command.split()[0] for recorded in EPISODES for command, *_ in recorded["steps"] if command.split()}
    assert said >= {
        "look",
        "inventory",
        "help",
        "go",
        "examine",
        "open",
        "close",
        "take",
        "move",
        "put",
        "use",
        "slice",
    }
    assert said >= {"clean", "heat", "cool"}
    observed = {observation for recorded in EPISODES for _, observation, *_ in recorded["steps"]}
    for words in (
        "Next to it, you see a ",
        "This is a cold",
        " sliced ",
        "You arrive at loc ",
        "you see nothing.",
        " is on.",
    ):
        assert any(words in observation for observation in observed), words
    assert any(done for recorded in EPISODES for _, _, _, done, _ in recorded["steps"])


def record(game: Game) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / game.task_id / "game.tw-pddl"
        write_game(game, path)
        theirs, ours = OfficialEpisode(path), AlfWorldEpisode(game)
        plan = SELDOM.get(game.task_id) or (verify.read_walkthrough(path) if game.goal.count == 2 else [])
        plan = plan[::-1]
        recorded: dict[str, Any] = {
            "game": json.loads(to_json(game)),
            "first_observation": theirs.first_observation(),
            "admissible": digest(theirs.admissible_commands()),
            "steps": [],
        }
        rng = random.Random(game.task_id)
        for _ in range(STEPS):
            command = verify._next_command(rng, ours, plan)
            ours.step(command)
            recorded["steps"].append([command, *theirs.step(command), digest(theirs.admissible_commands())])
    return recorded


if __name__ == "__main__":
    games = [*(generated(seed) for seed in (0, 5, 10, 33)), *ODD_GAMES, LAMP]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        episodes = pool.map(record, games)
    RECORD.write_text(json.dumps(episodes, indent=1) + "\n", encoding="utf-8")
