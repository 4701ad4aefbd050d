"""Where a GPU's memory does not suffice: the same episodes, fewer at once."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from polars.testing import assert_frame_equal

from dmr_pipeline.agent import memory
from dmr_pipeline.agent.memory import halving, in_pieces, out_of_memory_names
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.engine import play_alone
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.labels import measure
from tests.helpers.memory import fits
from tests.helpers.rollouts import HALF, HIGH, PROMPTER, ROUTE, RUNS, STEPS, rollouts_of, taken

GAMES = [run.task for run in RUNS]


def test_the_batch_is_halved_until_it_fits_and_the_episodes_are_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = play_alone(HIGH, GAMES, PROMPTER, STEPS, 7)
    ran = fits(monkeypatch, rows=2)
    with caplog.at_level(logging.WARNING, "dmr_pipeline"):
        ended: list[int] = []
        played = play_alone(HIGH, GAMES, PROMPTER, STEPS, 7, on_progress=ended.append)
    assert taken(played) == taken(expected)
    assert max(ran) == 1  # 7, 3, 1
    assert sum(ended) == len(GAMES)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "out of GPU memory with 7 episodes at once: going on with 3",
        "out of GPU memory with 3 episodes at once: going on with 1",
    ]


def test_what_breaks_off_inside_a_forward_pass_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the first layer is then written, that of the second is not."""
    expected = play_alone(HIGH, GAMES, PROMPTER, STEPS, 7)
    layer = HIGH.base_model.layers[1].self_attn.v_proj
    forward, extend, longest, broken = layer.forward, PackedStreams.extend, list[int](), list[int]()

    def noted(self, slots, chunks, counts=None):
        longest.append(max(self.lengths) if len(slots) > 1 else 0)
        return extend(self, slots, chunks, counts)

    def bounded(hidden_states):
        if longest[-1] > 60:
            broken.append(len(hidden_states))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(hidden_states)

    monkeypatch.setattr(PackedStreams, "extend", noted)
    monkeypatch.setattr(layer, "forward", bounded)
    assert taken(play_alone(HIGH, GAMES, PROMPTER, STEPS, 7)) == taken(expected)
    assert len(broken) == 2


def test_episodes_that_have_ended_are_not_played_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = play_alone(HIGH, GAMES, PROMPTER, STEPS, 2)
    begun: list[str] = []
    begin = Game.episode
    monkeypatch.setattr(Game, "episode", lambda game: begun.append(game.task_id) or begin(game))
    fits(monkeypatch, rows=1, after_calls=60)  # the first two episodes have ended by then, and others run
    ended: list[int] = []
    played = play_alone(HIGH, GAMES, PROMPTER, STEPS, 2, on_progress=ended.append)
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


def test_pieces_stay_as_small_as_fitted() -> None:
    sizes: list[int] = []

    def work(piece: Sequence[int]) -> list[int]:
        sizes.append(len(piece))
        if len(piece) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [10 * item for item in piece]

    assert in_pieces(range(14), 8, "episodes", work) == [10 * item for item in range(14)]
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2]
    assert in_pieces([], 8, "episodes", work) == []


def test_routed_episodes_and_their_labels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RandomMixing(HALF, seed=1)
    expected = rollouts_of(ROUTE).play(RUNS, policy, seed=0)
    frames = to_frames(expected, "mixed")
    rows = measure(rollouts_of(ROUTE), *frames, "action").steps
    fits(monkeypatch, rows=2)
    assert taken(rollouts_of(ROUTE).play(RUNS, policy, seed=0)) == taken(expected)
    fewer = measure(rollouts_of(ROUTE), *frames, "action").steps
    assert_frame_equal(fewer, rows, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("limit", "used", "of_all"),
    [("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")],
)
def test_a_container_s_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str, of_all: str
) -> None:
    (tmp_path / limit).write_text("5000000\n")
    (tmp_path / used).write_text("4000000\n")
    monkeypatch.setattr(memory, "_CGROUPS", ((str(tmp_path), limit, used, of_all),))
    assert memory.free_memory(torch.device("cpu")) == 1_000_000
    (tmp_path / "memory.stat").write_text(
        f"inactive_file 7\nanon 1000000\n{of_all}inactive_file 2000000\n{of_all}active_file 500000\n"
    )
    assert memory.free_memory(torch.device("cpu")) == 3_500_000, "files are let go of"
    (tmp_path / limit).write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > 4_000_000
