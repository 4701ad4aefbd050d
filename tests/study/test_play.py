"""Which games a study plays."""

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest

from dmr_pipeline.environments.base import Episode, Task
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.study import pages
from dmr_pipeline.study.design import Study
from dmr_pipeline.study.play import _games, _reworded
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.studies import made_up


def test_games_that_another_study_has_played_are_passed_over(tmp_path: Path) -> None:
    benchmark = benchmark_of(load_recipe("alfworld-tiny", REPOSITORY / "recipes").benchmark)
    first, others = (
        [game.task_id for game in _games(Study(recipe="alfworld-tiny", **more), benchmark, tmp_path, None)]
        for more in ({"games": 3}, {"games": 4, "first_game": 3})
    )
    assert first + others == [game.task_id for game in benchmark.fresh_tasks(7)]
    assert len(set(first + others)) == 7


def test_games_that_read_as_before_are_not_reworded() -> None:
    alfworld, webshop = (
        list(benchmark_of(load_recipe(name, REPOSITORY / "recipes").benchmark).fresh_tasks(2))
        for name in ("alfworld-tiny", "webshop-tiny")
    )
    others = _reworded(alfworld, 1)
    assert [game.task_id for game in others] == [game.task_id for game in alfworld]
    with pytest.raises(UserError, match="reworded: none of these games lists anything"):
        _reworded([Silent(game) for game in alfworld], 1)
    assert not webshop, "its tasks are a list"


@dataclass(frozen=True)
class Silent:
    """A task that lists nothing when it begins."""

    task: Task

    def episode(self) -> Episode:
        return Mock(first_observation=lambda: "You are in a room.")


def test_a_page_says_in_which_order_and_how_long_games_were() -> None:
    found = made_up()
    other = found.model_copy(update={"study": found.study.model_copy(update={"reworded": 1, "step_limit": 20})})
    told = pages.parts_of(other)["table"](Path("page.md"))
    assert "no split uses, which list what is seen in another order, of at most 20 steps; brackets" in told


def test_a_page_says_that_games_were_passed_over() -> None:
    found = made_up()
    later = found.model_copy(update={"study": found.study.model_copy(update={"first_game": 300})})
    told = [pages.parts_of(results)["table"](Path("page.md")) for results in (found, later)]
    assert "games of seeds that no split uses, after the first 300; brackets" in told[1]
    assert told[0] == told[1].replace(", after the first 300", "")
