"""Episodes on the disk: whole or not at all, and none is lost that was acknowledged."""

import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.inbox import misplaced_files
from dmr_pipeline.ingestion.incoming import look
from dmr_pipeline.ingestion.rules import Rules, read_episodes
from dmr_pipeline.ingestion.schema import EXAMPLE, LoggedEpisode
from dmr_pipeline.ingestion.stored import read_stored, store_episodes
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.serve.agent import RoutedAgent
from dmr_pipeline.serve.conversation import goal_in, read_conversation, task_in, without_task
from dmr_pipeline.serve.journal import Journal, episode_of
from tests.helpers.routers import random_router
from tests.helpers.serving import SERVED, babbling, served_recipe

RULES = Rules.of(served_recipe(), None)


def episode(number: int) -> LoggedEpisode:
    steps = [{**step, "precision": "float"} for step in EXAMPLE["steps"]] * 20  # of several pages
    return LoggedEpisode.model_validate({**EXAMPLE, "episode_id": f"e{number}", "steps": steps[:5]})


def write_until_killed(folder: Path, pipe: int) -> None:
    journal = Journal(SERVED, folder, RULES)
    for number in range(100_000):
        journal.write(episode(number))
        os.write(pipe, b".")


@settings(deadline=None, max_examples=12)
@given(acknowledged=st.integers(0, 12), further=st.floats(0, 0.004))
def test_a_kill_loses_nothing_that_was_acknowledged_and_leaves_nothing_half_written(
    acknowledged: int, further: float
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                write_until_killed(folder, writing)
            finally:
                os._exit(1)
        os.close(writing)
        told = sum(len(os.read(reading, 1)) for _ in range(acknowledged))
        time.sleep(further)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        while os.read(reading, 1):
            told += 1
        os.close(reading)
        found, left = look(folder / "incoming" / SERVED)
        assert left == []
        assert told <= len(found) <= told + 1
        for file in found:
            episodes, problems = read_episodes(file.path, file.path.read_bytes(), RULES, ())
            assert (len(episodes), problems) == (1, [])
        assert misplaced_files(folder, [SERVED]) == []


def test_what_the_recipe_does_not_take_is_not_written(tmp_path: Path) -> None:
    journal = Journal(SERVED, tmp_path, RULES)
    for changes, said in (
        ({"task_type": "cooking"}, "task_type"),
        ({"task_id": "valid_unseen/1"}, "held out"),
        ({"steps": [{"command": "look", "observation": "", "precision": "int8"}]}, "ladder"),
    ):
        with pytest.raises(UserError, match=said):
            journal.write(LoggedEpisode.model_validate({**episode(0).model_dump(exclude_none=True), **changes}))
    assert not journal.folder.exists()
    aside = journal.set_aside(episode(0))
    assert look(journal.folder) == ([], [])
    assert misplaced_files(tmp_path, [SERVED]) == []
    assert LoggedEpisode.model_validate_json(aside.read_text()) == episode(0)


def test_what_was_decided_is_stored_and_read_again(tmp_path: Path) -> None:
    """And where nothing is known of it there are no columns, so that what was stored before stays as it is."""
    decided = [
        {**step, "propensity": 0.75, "reason": "router", "release": 3, "probability": 0.5} for step in EXAMPLE["steps"]
    ]
    known = LoggedEpisode.model_validate({**EXAMPLE, "steps": decided})
    (tmp_path / "episodes").mkdir()
    store_episodes([known], tmp_path / "episodes" / "a.parquet")
    assert read_stored(tmp_path) == [known]
    import pyarrow.parquet as pq

    columns = [
        field.name for field in pq.read_schema(tmp_path / "episodes" / "a.parquet").field("steps").type.value_type
    ]
    assert columns == [
        "command",
        "thought",
        "observation",
        "precision",
        "probability",
        "propensity",
        "reason",
        "release",
    ]
    store_episodes([LoggedEpisode.model_validate(EXAMPLE)], tmp_path / "episodes" / "a.parquet")
    columns = [
        field.name for field in pq.read_schema(tmp_path / "episodes" / "a.parquet").field("steps").type.value_type
    ]
    assert columns == ["command", "thought", "observation", "precision"]


def test_an_episode_as_it_was_played() -> None:
    game, _ = generate_game(0, 50)
    agent, world = RoutedAgent(babbling(), random_router(threshold=0.0)), game.episode()
    agent.begin(game)
    observation = world.reset()
    with pytest.raises(UserError, match="no steps"):
        episode_of(agent.session, False)
    for _ in range(3):
        command = agent.act(observation).command
        observation, _, _ = world.step(command)
    logged = episode_of(agent.session, False, 0.5, observation)
    played = agent.end(False, 0.5, observation)
    assert [(s.command, s.observation) for s in logged.steps] == [(s.command, s.observation) for s in played.steps]
    assert (logged.task_id, logged.task, logged.reward) == (game.task_id, game.instruction, 0.5)
    assert RolloutRequest(game) == played.run


@pytest.mark.parametrize("seed", range(4))
def test_the_first_message_of_alfworld_is_its_task_and_what_a_reset_shows(seed: int) -> None:
    game, _ = generate_game(seed, 50)
    world = game.episode()
    for messages in (
        [{"role": "user", "content": world.first_observation()}],
        [{"role": "system", "content": f"You are in a house.\nYour task is to: {game.instruction}.\nAct."},
         {"role": "user", "content": [{"type": "text", "text": world.reset()}]}],
    ):  # fmt: skip
        told = read_conversation(messages)
        assert (told.task, told.observation, told.past) == (game.instruction, world.reset(), ())
    later = [*messages, {"role": "assistant", "content": "look", "reasoning_content": "hm"}, {"role": "tool", "content": "A"},
             {"role": "user", "content": "B"}]  # fmt: skip
    told = read_conversation(later, "another task")
    assert (told.task, told.observation) == ("another task", "A\nB")
    assert [(t.observation, t.command, t.thought) for t in told.past] == [(world.reset(), "look", "hm")]


def test_webshops_pages_hold_the_task() -> None:
    page = "Instruction: [SEP] Find me a red mug. [SEP] Search"
    told = read_conversation([{"role": "user", "content": page}])
    assert (told.task, told.observation) == ("Find me a red mug.", page)


TASK = re.compile(r"\s*Your task is to: *(?P<task>[^\n]+?)\.? *(?:\n|$)")
GOAL = re.compile(r"Instruction: *(?:\[SEP\])? *(?P<task>.+?) *(?:\[SEP\]|\n|$)")
"""What is meant, in a notation that takes too long on long texts."""
PIECES = ["Your task is to:", "Instruction:", "[SEP]", " ", "  ", "\n", "\t", "\r", "\u2003", ".", "a", "[", "]"]


@settings(max_examples=1000)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_the_task_is_what_the_line_says(text: str) -> None:
    found = TASK.search(text)
    assert task_in(text) == (found["task"] if found else None)
    assert without_task(text) == TASK.sub("\n", text)
    goal = GOAL.search(text)
    if goal is None or goal["task"].strip() not in ("", "[SEP]"):
        assert goal_in(text) == (goal["task"] if goal else None)


@pytest.mark.parametrize(
    "text",
    [
        "A room." + " " * 1_000_000 + "Your task is to: look.",
        "A room." + "\n" * 1_000_000 + "A mug. Your task is to: look.",
        "A room.\nYour task is to: look" + " " * 1_000_000 + "x",
        "A room.\n" + "Your task is to:\n" * 60_000 + "Your task is to: look.",
        "Instruction: look" + " " * 1_000_000 + "x",
        "Instruction:" + " " * 1_000_000 + "look",
    ],
)
def test_a_long_text_holds_nobody_up(text: str) -> None:
    started = time.process_time()
    assert read_conversation([{"role": "system", "content": text}, {"role": "user", "content": text}]).task
    assert time.process_time() - started < 2
