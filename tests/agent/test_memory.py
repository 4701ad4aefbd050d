"""Where a GPU's memory does not suffice: the same episodes, fewer at once."""

import logging

import pytest
import torch

from dmr_pipeline.agent.memory import halving, out_of_memory_names
from dmr_pipeline.agent.rollout import Trajectory, play_alone
from dmr_pipeline.agent.streams import Streams
from dmr_pipeline.errors import UserError
from tests.agent.test_rollout import HIGH, PROMPTER, RUNS, STEPS, taken

GAMES = [run.task for run in RUNS]


def fits(monkeypatch: pytest.MonkeyPatch, rows: int, after_calls: int = 0) -> list[int]:
    """Let a forward pass of more rows than these run out of memory, from some call on; the rows of those that ran."""
    extend, ran = Streams.extend, list[int]()

    def bounded(self, slots, chunks):
        if len(ran) >= after_calls and len(slots) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        ran.append(len(slots))
        return extend(self, slots, chunks)

    monkeypatch.setattr(Streams, "extend", bounded)
    return ran


def test_the_batch_is_halved_until_it_fits_and_the_episodes_are_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = play_alone(HIGH, GAMES, PROMPTER, STEPS, 7)
    ran = fits(monkeypatch, rows=2)
    with caplog.at_level(logging.WARNING, "dmr_pipeline"):
        ended: list[int] = []
        played = play_alone(HIGH, GAMES, PROMPTER, STEPS, 7, advance=ended.append)
    assert taken(played) == taken(expected)
    assert max(ran) == 1  # 7, 3, 1
    assert sum(ended) == len(GAMES)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "out of GPU memory with 7 episodes at once: going on with 3",
        "out of GPU memory with 3 episodes at once: going on with 1",
    ]


def test_episodes_that_have_ended_are_not_played_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = play_alone(HIGH, GAMES, PROMPTER, STEPS, 2)
    begun: list[str] = []
    begin = "dmr_pipeline.agent.rollout.begin_episode"
    from dmr_pipeline.environments.tasks import begin_episode

    monkeypatch.setattr(begin, lambda task: begun.append(task.task_id) or begin_episode(task))
    fits(monkeypatch, rows=1, after_calls=60)  # the first two episodes have ended by then, and others run
    ended: list[int] = []
    played = play_alone(HIGH, GAMES, PROMPTER, STEPS, 2, advance=ended.append)
    assert taken(played) == taken(expected)
    assert sum(ended) == len(GAMES)
    assert {begun.count(game.task_id) for game in GAMES} == {1, 2}
    assert begun.count(GAMES[0].task_id) == 1


def test_a_single_episode_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, rows=0)
    with pytest.raises(UserError, match=r"one of the episodes at a time.*benchmark.step_limit") as caught:
        play_alone(HIGH, GAMES, PROMPTER, STEPS, 4)
    assert "\n" not in str(caught.value)


def test_nothing_else_is_tried_again() -> None:
    tried: list[int] = []

    def work(count: int) -> list[Trajectory]:
        tried.append(count)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        halving(8, "episodes", work)
    assert tried == [8]


def test_a_training_that_does_not_fit_names_its_knob() -> None:
    with pytest.raises(UserError, match=r"kl_router\.batch_episodes"), out_of_memory_names("kl_router.batch_episodes"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
