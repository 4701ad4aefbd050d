"""What becomes of sessions that go on while a server ends and another one begins."""

import asyncio
import logging
import os
import time
from pathlib import Path

import pytest

from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.ingestion.schema import LoggedEpisode
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.serve import release as releases
from tests.helpers.serving import SERVED, chat, client_of

INCOMING = Path("data") / "incoming" / SERVED


@pytest.fixture
def game(served_project: Path) -> Task:
    tasks = served_project / "data" / SERVED / "benchmark_tasks"
    return benchmark_of(load_recipe(SERVED).benchmark).read_tasks(tasks, "router_train")[0]


def play(client, game: Task, texts: list[str], turns: int) -> list[tuple[str, str]]:
    """Command and precision of each turn; `texts` grows."""
    world, found = game.episode(), []
    world.reset()
    for text in texts[1::2]:
        world.step(text)
    for _ in range(turns):
        answer = chat(client, *texts, headers={"x-session-id": "a"})
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["message"]["content"]
        found.append((text, answer.headers["x-dmr-precision"]))
        texts += [text, world.step(text)[0]]
    return found


def test_an_episode_goes_on_in_the_next_server_as_if_nothing_had_happened(game: Task) -> None:
    rollouts = Rollouts.load(Path("data") / SERVED / "quantized_checkpoints", load_recipe(SERVED))
    router = releases.load(Path("data") / SERVED / "released_router" / "router", rollouts)
    (played,) = rollouts.play([RolloutRequest(game)], routing_policy(router, 1), 0)
    texts, found = [game.episode().first_observation()], []
    for turns in (2, 2, 1):
        with client_of() as client:
            found += play(client, game, texts, turns)
            if turns == 1:
                named = {"task_id": game.task_id, "task_type": game.task_type}
                said = client.post("/v1/sessions/a/outcome", json={"success": False, **named}).json()
        if len(found) == 2:
            (file,) = INCOMING.iterdir()
            assert file.name.endswith(".unended")
            assert "look" not in file.name
    assert found == [(step.command, step.precision) for step in played.steps]
    assert {precision for _, precision in found} == {"float", "int2"}
    (file,) = INCOMING.iterdir()
    assert file.name == said["file"]
    episode = LoggedEpisode.model_validate_json(file.read_text())
    assert [(step.command, step.precision) for step in episode.steps] == found
    assert [step.release for step in episode.steps] == [1] * 5


def test_an_answer_that_was_lost_with_the_server_is_told_again_and_an_outcome_needs_no_turn(game: Task) -> None:
    texts = [game.episode().first_observation()]
    with client_of() as client:
        found = play(client, game, texts, 2)
    with client_of() as client:
        again = chat(client, *texts[:-2], headers={"x-session-id": "a"})
        assert (again.json()["choices"][0]["message"]["content"], again.headers["x-dmr-turn"]) == (found[1][0], "2")
        assert client.service.metrics.total("dmr_tokens_total", kind="completion") == 0
    with client_of() as client:
        named = {"task_id": game.task_id, "task_type": game.task_type}
        assert client.post("/v1/sessions/a/outcome", json={"success": True, **named}).json()["logged"]
        assert client.post("/v1/sessions/b/outcome", json={"success": True, **named}).status_code == 404
    (file,) = INCOMING.iterdir()
    assert len(LoggedEpisode.model_validate_json(file.read_text()).steps) == 2


def test_what_waits_is_kept_although_a_step_takes_longer_than_the_server_has(game: Task) -> None:
    texts = [game.episode().first_observation()]
    with client_of() as client:
        play(client, game, texts, 1)
        service = client.service

        async def act_for_ever() -> None:
            service._running.add(asyncio.create_task(asyncio.sleep(60)))

        client.portal.call(act_for_ever)
        begun = time.monotonic()
    assert time.monotonic() - begun < 30
    assert [file.suffix for file in INCOMING.iterdir()] == [".unended"]


def test_who_does_not_come_back_in_time_has_no_outcome(game: Task) -> None:
    with client_of() as client:
        play(client, game, [game.episode().first_observation()], 1)
    with client_of(session_seconds=60) as client:
        (file,) = INCOMING.iterdir()
        assert file.name.endswith(".unended")
    os.utime(file, (time.time() - 61, time.time() - 61))
    with client_of(session_seconds=60) as client:
        (aside,) = INCOMING.iterdir()
        assert client.service.metrics.total("dmr_episodes_total", outcome="unknown") == 1
    assert aside.name.endswith(".unknown")
    assert len(LoggedEpisode.model_validate_json(aside.read_text()).steps) == 1


def test_what_another_version_has_left_is_not_taken_over(game: Task, caplog: pytest.LogCaptureFixture) -> None:
    texts = [game.episode().first_observation()]
    with client_of() as client:
        play(client, game, texts, 1)
    (file,) = INCOMING.iterdir()
    file.write_text('{"session_id": "a"}')
    with client_of() as client, caplog.at_level(logging.WARNING):
        play(client, game, texts, 1)
        assert "another version" in caplog.text
        done = client.post("/v1/sessions/a/outcome", json={"success": True}).json()
    assert "played elsewhere" in done["why"]
    assert list(INCOMING.iterdir()) == []


def test_a_disk_that_is_full_as_the_server_ends_is_counted(
    game: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with client_of() as client, caplog.at_level(logging.WARNING):
        play(client, game, [game.episode().first_observation()], 1)
        monkeypatch.setattr("dmr_pipeline.serve.unended.write_whole", full)
    assert "No space left on device" in caplog.text
    assert client.service.metrics.total("dmr_log_errors_total") == 1
