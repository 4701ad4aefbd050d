"""Which games a study plays."""

from pathlib import Path

from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.study import pages
from dmr_pipeline.study.design import Study
from dmr_pipeline.study.play import _games
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


def test_a_page_says_that_games_were_passed_over() -> None:
    found = made_up()
    later = found.model_copy(update={"study": found.study.model_copy(update={"first_game": 300})})
    told = [pages.parts_of(results)["table"](Path("page.md")) for results in (found, later)]
    assert "games of seeds that no split uses, after the first 300; brackets" in told[1]
    assert told[0] == told[1].replace(", after the first 300", "")
