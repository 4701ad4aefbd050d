"""The teacher: it wins, from wherever it is put."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dmr_pipeline.cli import app
from dmr_pipeline.environments.webshop.engine import State, WebShopEpisode
from dmr_pipeline.environments.webshop.expert import ShoppingExpert
from dmr_pipeline.environments.webshop.goals import ShoppingTask
from dmr_pipeline.environments.webshop.tasks import read_shopping_tasks

STEP_LIMIT = 15


def play(task: ShoppingTask, mistakes: Sequence[int] = (), seed: int = 0) -> tuple[float, list[str]]:
    """The reward, and the commands; at the steps in `mistakes` a random command but buying is taken."""
    rng, episode, expert = random.Random(seed), WebShopEpisode(task), ShoppingExpert(task)
    expert.observe(None, episode.reset())
    commands: list[str] = []
    while len(commands) < STEP_LIMIT:
        command = expert.act()
        if len(commands) in mistakes:
            command = rng.choice([c for c in episode.admissible_commands() if c != "click[buy now]"])
        commands.append(command)
        observation, reward, over = episode.step(command)
        if over:
            return reward, commands
        expert.observe(command, observation)
    return 0.0, commands


@pytest.fixture(scope="module")
def tasks(webshop_tasks: Path) -> list[ShoppingTask]:
    return read_shopping_tasks(webshop_tasks, "validation")


def test_it_earns_the_full_reward_on_at_least_95_percent_of_generated_goals(tasks: list[ShoppingTask]) -> None:
    played = [play(task) for task in tasks]
    assert sum(reward == 1.0 for reward, _ in played) >= 0.95 * len(tasks)
    assert all(commands[0].startswith("search[") for _, commands in played)
    # Where a product lacks an option the expert goes back, which is what recovery is learned from.
    assert any("click[< prev]" in commands for _, commands in played)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 99), st.sets(st.integers(1, 5), max_size=2))
def test_it_repairs_mistakes(tasks: list[ShoppingTask], seed: int, index: int, mistakes: set[int]) -> None:
    task = tasks[index % len(tasks)]
    undisturbed, commands = play(task)
    if undisturbed == 1.0 and len(commands) <= 6:
        reward, disturbed = play(task, sorted(mistakes), seed)
        assert reward == 1.0 or len(disturbed) == STEP_LIMIT


def test_a_goal_that_its_own_product_does_not_satisfy_is_told(tasks: list[ShoppingTask]) -> None:
    task = tasks[0]
    assert ShoppingExpert(task).can_be_satisfied()
    cheaper = task.goal.model_copy(update={"price_upper": 0.01})
    assert not ShoppingExpert(ShoppingTask(cheaper, task.shop)).can_be_satisfied()


def test_a_look_is_a_page_and_a_click_that_may_do(tasks: list[ShoppingTask]) -> None:
    rng, places = random.Random(0), []
    for task in tasks[:30]:
        look = task.demonstration(rng)
        assert look.command is not None
        asin = look.command.removeprefix("click[").removesuffix("]")
        row = task.shop.row(asin)
        assert row is not None
        assert ShoppingExpert(task).may_satisfy(row)
        shown = [task.shop.row(text) for text in look.observation.split(" [SEP] ") if task.shop.row(text) is not None]
        places.append(shown.index(row))
        episode = WebShopEpisode(task)
        episode.state = State("results", tuple(r for r in shown if r is not None))
        assert episode.observation() == look.observation
    assert len(set(places)) > 3


def test_the_command_says_how_well_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Path("recipes").resolve()
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((recipes / "webshop-tiny.yaml").read_text(encoding="utf-8"))
    recipe["benchmark"]["products"] = 600
    Path("recipes").mkdir()
    Path("recipes/small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    Path("recipes/alfworld-tiny.yaml").write_bytes((recipes / "alfworld-tiny.yaml").read_bytes())
    done = CliRunner().invoke(app, ["env", "experts", "webshop", "--recipe", "small", "--goals", "20"])
    assert "600 generated products" in done.stdout
    assert "of 20 eval goals in 15 steps" in done.stdout
    done = CliRunner().invoke(app, ["env", "experts", "webshop", "--recipe", "alfworld-tiny"])
    assert done.exit_code == 2
    assert "its benchmark is alfworld" in done.stderr
