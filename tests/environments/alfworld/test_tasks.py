"""The official games dealt to the splits."""

from pathlib import Path

import pytest

from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.alfworld import tasks
from dmr_pipeline.environments.alfworld.benchmark import OfficialAlfWorld
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.benchmark import SPLITS, benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.benchmark import Splits
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.stages.benchmark_tasks import benchmark_tasks

GAMES = {"train": [generate_game(seed)[0] for seed in range(12)], "valid_seen": [generate_game(99)[0]]}


def deal(monkeypatch: pytest.MonkeyPatch, output: Path, seed: int = 0, **splits: int) -> dict[str, list[str]]:
    monkeypatch.setattr(tasks, "read_official", lambda split: list(GAMES[split]))
    sizes = {"agent_train": 5, "router_train": 3, "validation": 2, "test": 1} | splits
    benchmark = OfficialAlfWorld(seed=seed, splits=Splits(**sizes))
    recipe = load_recipe("alfworld-tiny-official").model_copy(update={"benchmark": benchmark})
    output.mkdir()
    benchmark_tasks(StageContext(recipe, {}, output, output))
    return {split: [game.task_id for game in benchmark_of(benchmark).read_tasks(output, split)] for split in SPLITS}


def test_splits_share_no_game_and_the_seed_deals_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dealt = deal(monkeypatch, tmp_path / "a")
    assert [len(ids) for ids in dealt.values()] == [5, 3, 2, 1]
    assert dealt["test"] == ["generated/99"]
    train = [task_id for split, ids in dealt.items() if split != "test" for task_id in ids]
    assert len(set(train)) == 10
    assert set(train) <= {game.task_id for game in GAMES["train"]}
    assert deal(monkeypatch, tmp_path / "b") == dealt
    assert deal(monkeypatch, tmp_path / "c", seed=1)["agent_train"] != dealt["agent_train"]


def test_too_few_official_games_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"splits.validation: 5 games, but official train has 4 left"):
        deal(monkeypatch, tmp_path / "a", validation=5)
    with pytest.raises(UserError, match=r"splits.test: 2 games, but official valid_seen has 1 left"):
        deal(monkeypatch, tmp_path / "b", test=2)
