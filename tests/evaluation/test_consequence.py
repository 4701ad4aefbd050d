"""Consequences of many games: resumed where they broke off, and kept under all that they depend on."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation import consequence
from dmr_pipeline.evaluation.consequence import Spent, label_games
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from tests.helpers.rollouts import ROUTE, RUNS, rollouts_of

RECIPE = load_recipe("alfworld-tiny")
ARTIFACTS = {stage: Path(stage) for stage in ("benchmark_tasks", "quantized_checkpoints")}
GAMES = [run.task for run in RUNS[:3]]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The games of each call that plays, as it comes; nothing is read from artifacts."""
    monkeypatch.setattr(consequence, "GAMES_AT_ONCE", 1)
    monkeypatch.setattr(consequence, "content", lambda folder, prefix="": {})
    monkeypatch.setattr(consequence, "acting_facts", lambda *_: {})
    calls: list[list[str]] = []
    real = consequence.consequences

    def consequences(rollouts, games, *rest):
        calls.append([game.task_id for game in games])
        return real(rollouts, games, *rest)

    monkeypatch.setattr(consequence, "consequences", consequences)
    return calls


def label(
    folder: Path,
    behaviour="mixed",
    games=GAMES,
    on_games: Callable[[int], None] = lambda _: None,
    recipe: Recipe = RECIPE,
) -> tuple[pl.DataFrame, Spent]:
    return label_games(rollouts_of(ROUTE), recipe, games, behaviour, ["low", "high"], ARTIFACTS, folder, on_games)


def test_what_broke_off_goes_on(tmp_path: Path, played: list[list[str]]) -> None:
    whole, _ = label(tmp_path / "whole")
    assert set(whole["continuation"]) == {"low", "high"}
    assert played == [[game.task_id] for game in GAMES]
    played.clear()
    told: list[int] = []

    def break_off(count: int) -> None:
        told.append(count)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(tmp_path / "resumed", on_games=break_off)
    resumed, spent = label(tmp_path / "resumed")
    assert played == [[game.task_id] for game in GAMES], "each game once"
    assert_frame_equal(resumed, whole, check_exact=False)
    assert spent.actions > spent.looked_up > 0
    assert spent == label(tmp_path / "resumed")[1], "of all runs together"


def test_other_episodes_are_played_anew(tmp_path: Path, played: list[list[str]]) -> None:
    label(tmp_path, games=GAMES[:1])
    label(tmp_path, games=GAMES[:2])
    label(tmp_path, "low", games=GAMES[:1])
    first, second = GAMES[0].task_id, GAMES[1].task_id
    assert played == [[first], [second], [first]]


def test_drawn_actions_are_refused(tmp_path: Path) -> None:
    drawn = RECIPE.model_copy(update={"agent": RECIPE.agent.model_copy(update={"temperature": 0.7})})
    with pytest.raises(UserError, match=r"agent\.temperature is 0\.7"):
        label(tmp_path, recipe=drawn)
