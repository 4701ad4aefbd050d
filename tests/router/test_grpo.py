import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from dmr_pipeline.artifacts.manifest import hash_files
from dmr_pipeline.artifacts.resume import save_state
from dmr_pipeline.artifacts.stage import StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.rollout.cost import episode_cost
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.reading import Reading
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router import grpo
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.grpo import LOG, Scorer, Session, divergence, game_order, tilt_for
from dmr_pipeline.router.grpo_trainer import Rollout
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import load_router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.stages import grpo_router as the_stage
from tests.helpers.grpo_router import run_stage, tiny_recipe
from tests.helpers.routers import CPU

REPOSITORY = Path(__file__).parents[2]


@given(st.lists(st.lists(st.floats(-30, 30), min_size=2, max_size=2), min_size=1, max_size=20), st.floats(0.05, 0.95))
def test_a_tilt_gives_the_spend_whatever_the_scores(scores: list[list[float]], ratio: float) -> None:
    spend = np.array([0.2, 1.0])
    tilt = tilt_for(np.array(scores), spend, ratio)
    shares = softmax(np.pad(np.array(scores) + tilt * spend, [(0, 0), (1, 0)]), axis=1)
    assert (shares[:, 1:] @ spend).mean() == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_that_no_tilt_gives_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="initial_ratio"):
        tilt_for(np.zeros((3, 1)), np.ones(1), ratio)


@given(st.floats(0.0, 1.0), st.floats(-20, 20))
def test_divergence_of_two_rungs_is_that_of_two_bernoullis(p: float, score: float) -> None:
    other = torch.distributions.Bernoulli(logits=torch.tensor(score, dtype=torch.double))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(torch.tensor(p, dtype=torch.double)), other
    )
    assert divergence(np.array([[p]]), np.array([[score]]))[0] == pytest.approx(float(expected), abs=1e-6)


def test_every_pass_over_the_games_meets_all_of_them() -> None:
    order = game_order(["a", "b", "c", "d"], 10, seed=3)
    assert len(order) == 10
    assert Counter(order[:4]) == Counter(order[4:8]) == Counter("abcd")
    assert order == game_order(["a", "b", "c", "d"], 10, seed=3)
    assert game_order([], 10, seed=3) == []  # all games are in the update: none is left to refill it
    assert len({tuple(game_order(["a", "b", "c", "d"], 4, seed)) for seed in range(10)}) > 3


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_artifact_and_log(artifacts: Path, unbroken: tuple[Path, StageResult]) -> None:
    folder, result = unbroken
    router, stage_1 = (load_router(path / ROUTER_FOLDER, CPU) for path in (folder / "output", artifacts / "kl_router"))
    assert router.settings.threshold == 0.5
    assert router.settings.scale == stage_1.settings.scale
    assert router.settings.offsets == result.summary["start_offsets"] != stage_1.settings.offsets
    assert list(router.settings.offsets) == ["float"]

    log = pl.read_parquet(folder / "output" / "training.parquet")
    assert log.schema == LOG
    assert log["update"].to_list() == [0, 1, 2, 3, 4]
    assert log.filter(pl.col("validation_reward").is_not_null())["update"].to_list() == [0, 2, 4]
    trained = log.filter(pl.col("update") > 0)
    assert trained.drop_nulls("reward").height == 4
    assert trained["divergence"][0] == pytest.approx(0.0, abs=1e-6)
    assert trained["divergence"][-1] > 1e-5
    assert (trained["reward"] - trained["success"] + trained["cost"]).abs().max() < 1e-9  # difference, lambda 1
    assert trained["ratio"][0] == pytest.approx(0.6, abs=0.25)
    best = log.filter(pl.col("validation_reward") == log["validation_reward"].max())
    assert result.summary["chosen_update"] == best["update"][0] > 0
    assert log["validation_cost"].drop_nulls()[-1] < log["validation_cost"][0]  # all there is to learn here

    # What the manifest says of the chosen weights holds for those in the artifact.
    recipe = tiny_recipe()
    rollouts = Rollouts.load(artifacts / "quantized_checkpoints", recipe)
    scorer = Scorer(rollouts, router.pass_bytes, recipe.grpo_router)
    games = benchmark_of(recipe.benchmark).read_tasks(artifacts / "benchmark_tasks", "validation", 3)
    means = scorer.means(
        rollouts.play([RolloutRequest(game) for game in games], routing_policy(router, 3), seed=0), 1.0
    )
    for name, value in means.items():
        assert result.summary[f"validation_{name}"] == pytest.approx(value, abs=1e-6)


def test_cost_is_in_always_high_episodes_with_the_router(artifacts: Path) -> None:
    recipe = tiny_recipe()
    rollouts = Rollouts.load(artifacts / "quantized_checkpoints", recipe)
    scorer = Scorer(rollouts, PassBytes(1000), recipe.grpo_router)
    run = RolloutRequest(benchmark_of(recipe.benchmark).read_tasks(artifacts / "benchmark_tasks", "validation", 1)[0])
    trajectory = rollouts.play([run], RandomMixing({"float": 0.5, "int2": 0.5}, 1), seed=0)[0]
    trajectory.steps = [replace(step, router=Reading(1)) for step in trajectory.steps]
    agent_alone = episode_cost(trajectory, rollouts.acting.pass_bytes, 16).total
    expected = (agent_alone + 1000 * len(trajectory.steps)) / rollouts.unit_bytes
    assert scorer.cost(trajectory) == pytest.approx(expected)
    assert 0 < trajectory.share("float") < 1
    high = Trajectory(run, "", [replace(step, precision="float") for step in trajectory.steps])
    assert scorer.cost(high) > scorer.cost(trajectory)


def test_a_killed_training_resumes_with_the_bytes_of_an_unbroken_one(
    artifacts: Path, unbroken: tuple[Path, StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by SIGKILL in its fourth update, two after the last checkpoint."""
    killed = "from tests.helpers.grpo_router import run_and_be_killed; run_and_be_killed()"
    run = subprocess.run(
        [sys.executable, "-c", killed, artifacts, tmp_path], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not any((tmp_path / "output").iterdir())

    updates: list[int] = []
    rollouts = Session.rollouts

    def counted(session: Session, update: int, task_ids: list[str]) -> list[Rollout]:
        updates.append(update)
        return rollouts(session, update, task_ids)

    monkeypatch.setattr(Session, "rollouts", counted)
    result = run_stage(artifacts, tmp_path)
    assert updates == [3, 4]
    expected, summary = contents(unbroken[0] / "output"), unbroken[1].summary
    assert contents(tmp_path / "output") == expected
    assert result.summary == summary

    # Killed once more, after the training and before the artifact was whole.
    (tmp_path / "output").rename(tmp_path / "first")
    assert run_stage(artifacts, tmp_path).summary == summary
    assert updates == [3, 4]
    assert contents(tmp_path / "output") == expected


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_text(f"weights after {step}")
        save_state(folder / grpo.SESSION, {"rows": [], "best": {}, "files": hash_files(folder)})
    last = grpo.last_checkpoint(tmp_path)
    assert last is not None
    assert last.folder.name == "checkpoint-4"
    (tmp_path / "checkpoint-4" / "model.safetensors").write_text("weights after 5")
    before = grpo.last_checkpoint(tmp_path)
    assert before is not None
    assert before.folder.name == "checkpoint-2"
    assert "checkpoint-4/session.pt: this resume state is damaged" in caplog.text
    (tmp_path / "checkpoint-2" / grpo.SESSION).write_bytes(b"")
    assert grpo.last_checkpoint(tmp_path) is None


def test_a_training_that_does_not_fit_a_gpu_names_its_knob(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(the_stage, "train", out_of_memory)
    with pytest.raises(UserError, match=r"make grpo_router\.group_size smaller"):
        run_stage(artifacts, tmp_path)
