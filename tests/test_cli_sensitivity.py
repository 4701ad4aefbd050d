"""`dmr sensitivity analyse`, whose games were played elsewhere."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dmr_pipeline.cli import app, stages
from dmr_pipeline.cli.common import console
from dmr_pipeline.environments import benchmark
from dmr_pipeline.evaluation import consequence
from dmr_pipeline.evaluation.consequence import Spent
from dmr_pipeline.rollout.playing import Rollouts
from tests.helpers.consequences import labelled_steps


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """What `label_games` was asked for, who plays."""
    found: list[object] = []

    def label_games(rollouts, recipe, games, behaviour, continuations, artifacts, folder, *_):
        found.extend([behaviour, continuations, sorted(artifacts)])
        folder.mkdir(parents=True)
        logging.getLogger("dmr_pipeline.rollout").warning("of the games")
        needed = np.arange(200) % 20 == 7
        return labelled_steps(needed, needed.astype(float)), Spent(seconds=12, actions=200, looked_up=150)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    recipe = Path(__file__).parents[1] / "recipes" / "alfworld-tiny.yaml"
    (tmp_path / "recipes" / "alfworld-tiny.yaml").write_bytes(recipe.read_bytes())
    monkeypatch.setattr(stages, "verify_current", lambda stage, _: SimpleNamespace(path=tmp_path / stage))
    monkeypatch.setattr(Rollouts, "load", lambda *_: None)
    monkeypatch.setattr(benchmark, "benchmark_of", lambda _: SimpleNamespace(read_tasks=lambda *_: ["a game"] * 10))
    monkeypatch.setattr(consequence, "label_games", label_games)
    monkeypatch.setattr(console, "_width", 100)
    return found


def dmr_sensitivity(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["sensitivity", "analyse", "alfworld-tiny", *arguments])


def test_tables_refusals_and_what_it_took(asked: list[object]) -> None:
    result = dmr_sensitivity("--behaviour", "mixed", "--continuations", "low, grpo_router")
    assert result.exit_code == 0, result.output
    assert asked == ["mixed", ["low", "grpo_router"], ["benchmark_tasks", "grpo_router", "quantized_checkpoints"]]
    assert re.search(r"KL\(high\|\|low\) +1\.00 \(1\.00 to 1\.00\)", result.output)
    assert "of the games" in result.output
    assert "turns 0-4: high precision is needed at 0 of 100 steps" in result.output
    assert "Took 12 s: 200 actions, 75% of them looked up; the branches read 400 tokens" in result.output


def test_json_and_nothing_else(asked: list[object]) -> None:
    told = json.loads(dmr_sensitivity("--json").stdout)
    assert (told["behaviour"], told["continuations"]) == ("kl_router", ["low", "high", "kl_router"])
    assert Path(told["steps"]).is_file()
    assert told["one_swap"] is None
    assert told["parts"][0]["predictions"][0]["auroc"] == {"value": 1, "low": 1, "high": 1}
    assert told["parts"][1]["refusal"].startswith("high precision is needed at 0 of 100")


def test_a_continuation_that_there_is_not_is_one_line(asked: list[object]) -> None:
    result = dmr_sensitivity("--continuations", "low,int4")
    assert result.exit_code == 2
    assert "--continuations: 'int4' is none of low, high, mixed, kl_router, grpo_router" in result.output
    assert not asked
