"""A router set to a budget: agents and router babble, the games are real."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.progress import Progress

from dmr_pipeline.environments.alfworld.benchmark import GeneratedGames
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.benchmark import SPLITS, fresh_seeds, split_seeds
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation import route_calibration
from dmr_pipeline.evaluation.play import Arena
from dmr_pipeline.evaluation.route_calibration import Calibration, RouteBudget, _rule, calibrate
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.fields import MOST_SEED
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.playing import PolicyRuns, Rollouts
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.model import Router, load_router, save_router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.router.rules import named_at, rule_at_bar, rules
from tests.helpers.rollouts import ROUTE, rollouts_of
from tests.helpers.routers import CPU, random_router

REPOSITORY = Path(__file__).parents[2]
VALIDATION, FRESH = ([generate_game(seed)[0] for seed in seeds] for seeds in (range(12), range(20, 26)))
RECIPE = load_recipe("alfworld-tiny", REPOSITORY / "recipes")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many episodes each rollout had."""
    found: list[int] = []
    router = random_router(threshold=0.4)
    arena = Arena(rollouts_of(ROUTE), {"float": 32.0, "int2": 2.5}, 0)
    play_each = Rollouts.play_each

    def counting(rollouts: Rollouts, plays: Sequence[PolicyRuns], *others: object) -> None:
        found.extend(len(play.runs) for play in plays)
        play_each(rollouts, plays, *others)

    monkeypatch.setattr(Arena, "load", lambda *_: arena)
    monkeypatch.setattr(Rollouts, "play_each", counting)
    monkeypatch.setattr(route_calibration, "load_router", lambda *_: router)
    monkeypatch.setattr(route_calibration, "content", lambda *_: {})
    monkeypatch.setattr(route_calibration, "router_content", lambda *_: {})
    monkeypatch.setattr(route_calibration, "acting_facts", lambda *_: {})
    return found


Settle = Callable[[RouteBudget], tuple[Calibration, Router]]


@pytest.fixture
def settle(played: list[int], tmp_path: Path) -> Settle:
    artifacts = dict.fromkeys(("benchmark_tasks", "quantized_checkpoints", "kl_router"), tmp_path)

    def settled(budget: RouteBudget, recipe: Recipe = RECIPE) -> tuple[Calibration, Router]:
        with Progress(disable=True) as progress:
            return calibrate(recipe, "kl_router", budget, artifacts, VALIDATION, FRESH, tmp_path / "kept", progress)

    return settled


@pytest.mark.parametrize("sample", [False, True])
def test_a_ratio_on_validation_games_and_what_it_is_on_fresh_ones(
    settle: Settle, played: list[int], sample: bool, tmp_path: Path
) -> None:
    found, router = settle(RouteBudget(0.3, None, sample))
    assert 0.2 < found.validation.high_ratio <= 0.3
    low, high = found.validation.high_ratio_ci95
    assert low < found.validation.high_ratio < high
    assert (found.validation.games, found.fresh.games) == (len(VALIDATION), len(FRESH))
    assert played.count(len(FRESH)) == 1
    assert found.sample == sample
    assert router.settings.target_ratio == 0.3
    # What is written down plays the same episodes.
    save_router(router, tmp_path / "router")
    again = load_router(tmp_path / "router", CPU)
    assert again.settings == router.settings
    policy = routing_policy(again, len(FRESH))
    steps = [
        step for t in rollouts_of(ROUTE).play([RolloutRequest(game) for game in FRESH], policy, 0) for step in t.steps
    ]
    assert np.mean([step.precision == "float" for step in steps]) == pytest.approx(found.fresh.high_ratio, abs=1e-6)


def test_a_rule_is_set_to_a_budget_as_routers_are(played: list[int], tmp_path: Path) -> None:
    """And its name and threshold play the same."""
    artifacts = dict.fromkeys(("benchmark_tasks", "quantized_checkpoints"), tmp_path)
    with Progress(disable=True) as progress:
        budget = RouteBudget(0.3, None)
        found, router = calibrate(RECIPE, "margin", budget, artifacts, VALIDATION, FRESH, tmp_path / "kept", progress)
        with pytest.raises(UserError, match="too short"):
            _rule("margin_capped", Arena(replace(rollouts_of(ROUTE), step_limit=5), {}, 0), RECIPE.evaluation)
    assert router is None
    assert 0.2 < found.validation.high_ratio <= 0.3
    rollouts = rollouts_of(ROUTE)
    there = rules(ROUTE, rollouts.step_limit, rollouts.prompter, True, 0)
    named = rule_at_bar(named_at("margin", found.bar), there, ROUTE)
    episodes = rollouts.play([RolloutRequest(game) for game in VALIDATION], named, 0)
    steps = [step for trajectory in episodes for step in trajectory.steps]
    ratio = sum(step.precision == "float" for step in steps) / len(steps)
    assert ratio == pytest.approx(found.validation.high_ratio, abs=1e-6)


def test_the_same_command_again_plays_nothing(settle: Settle, played: list[int]) -> None:
    found, _ = settle(RouteBudget(0.3, None))
    count = len(played)
    assert settle(RouteBudget(0.3, None))[0] == found
    assert len(played) == count
    settle(RouteBudget(0.3, None, sample=True))
    assert len(played) > count


def test_a_strict_budget_holds_in_every_episode(settle: Settle, tmp_path: Path) -> None:
    found, router = settle(RouteBudget(0.4, None, strict=True))
    assert router.settings.strict == found.strict == 0.4
    tables = [pl.read_parquet(path) for path in (tmp_path / "kept").iterdir()]
    episodes = pl.concat([table for table in tables if "high_steps" in table.columns])
    assert {*episodes["high_steps"]} != {0}
    for high, steps in episodes.select("high_steps", "steps").iter_rows():
        assert high <= math.ceil(round(0.4 * steps, 9))


def test_a_cost_takes_what_wins_most_within_it(settle: Settle, tmp_path: Path) -> None:
    everything, _ = settle(RouteBudget(None, 1e12))
    tables = [pl.read_parquet(path) for path in (tmp_path / "kept").iterdir()]
    tried = [table for table in tables if "cost" in table.columns and table.height == len(VALIDATION)]
    points = sorted((-table["success"].mean(), table["cost"].mean()) for table in tried)
    assert len(points) > 5
    assert (-everything.validation.success, everything.validation.cost) == pytest.approx(points[0], abs=1e-6)
    costs = sorted(cost for _, cost in points)
    middle = costs[len(costs) // 2]
    within, router = settle(RouteBudget(None, middle))
    best = min(point for point in points if point[1] <= middle)
    assert (-within.validation.success, within.validation.cost) == pytest.approx(best, abs=1e-6)
    assert router.settings.target_ratio is None
    with pytest.raises(UserError, match=r"costs .* at least on validation games: ask for more"):
        settle(RouteBudget(None, costs[0] / 2))


def test_budgets_that_cannot_be_are_one_line() -> None:
    for budget, said in (
        ((None, None), "give one budget"),
        ((0.2, 0.5), "give one budget"),
        ((1.0, None), "--high-ratio 1: give a share"),
        ((None, 0.0), "--cost 0: give a mean cost"),
        ((None, 0.5, False, True), "--strict holds a ratio"),
    ):
        with pytest.raises(UserError, match=said):
            RouteBudget(*budget)


def test_fresh_games_are_in_no_split_of_any_recipe() -> None:
    games = RECIPE.benchmark
    for seed in (0, 1, MOST_SEED):
        settings = games.model_copy(update={"seed": seed})
        fresh = fresh_seeds(settings, 10_000_000)
        for other in (0, 1, seed, MOST_SEED):
            for split in SPLITS:
                used = split_seeds(games.model_copy(update={"seed": other}), split)
                assert used.stop <= fresh.start
    first, second = GeneratedGames(games).fresh_tasks(2)
    assert first.task_id != second.task_id
    assert GeneratedGames.names_in(first.task_id) == [first.task_id]


def test_a_router_without_a_fresh_game_says_so(settle: Settle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    artifacts = dict.fromkeys(("benchmark_tasks", "quantized_checkpoints", "kl_router"), tmp_path)
    with Progress(disable=True) as progress:
        found, _ = calibrate(
            RECIPE, "kl_router", RouteBudget(0.3, None), artifacts, VALIDATION, [], tmp_path / "kept", progress
        )
    assert found.fresh is None


def test_forced_steps_beyond_the_budget_are_told(settle: Settle, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmr_pipeline.rollout.policy import Forced

    asking = route_calibration.asking_policy

    def forced(router: Router, slots: int) -> Forced:
        return Forced(asking(router, slots), "float", ROUTE, lambda slots, peek: [True] * len(slots))

    monkeypatch.setattr(route_calibration, "asking_policy", forced)
    with pytest.raises(UserError, match=r"spends 1.000 at least, with its forced steps"):
        settle(replace(RouteBudget(0.3, None)))
