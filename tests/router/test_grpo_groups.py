"""Groups of episodes: what branches are credited with against the exact gradient, and how they are played."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.artifacts.stage import StageResult
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.recipe.grpo_router import GrpoBudget, GrpoRouter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Step, Trajectory
from dmr_pipeline.router import grpo
from dmr_pipeline.router.grpo import Scorer, entropy, merit_within, next_price
from dmr_pipeline.router.grpo_groups import Group, branch_advantages, play_groups, refilled
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import load_router
from dmr_pipeline.router.policies import Resumed, _Chooser
from tests.helpers.grpo_router import run_stage, tiny_recipe
from tests.helpers.routers import CPU, random_router

ROUTE = ("float", "int4", "int2")
GAMES = [generate_game(seed)[0] for seed in range(3)]


def step(precision: str, chances: Sequence[float], forced: bool = False) -> Step:
    return Step([1], [2], "look", "", precision, tuple(np.cumsum(chances)[:-1].tolist()), forced=forced)


@given(
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    st.integers(3, 11),
    st.integers(1, 30),
)
def test_branches_give_the_gradient_of_the_expected_reward(
    logits: list[float], worth: list[float], size: int, decisions: int
) -> None:
    """d/d logit_b of sum_a p(a) worth(a) is p(b) (worth(b) - V); REINFORCE over the members has to give T times that."""
    p = np.exp(logits) / np.exp(logits).sum()
    dealt = [ROUTE[member % 3] for member in range(size)]
    rewards = [worth[ROUTE.index(rung)] for rung in dealt]
    advantages = branch_advantages([step(rung, p.tolist()) for rung in dealt], rewards, decisions, ROUTE)
    assert sum(advantages) == pytest.approx(0, abs=1e-8 * decisions)
    of_log_p = [np.eye(3)[ROUTE.index(rung)] - p for rung in dealt]  # by each logit
    gradient = np.mean([a * g for a, g in zip(advantages, of_log_p, strict=True)], axis=0)
    assert gradient == pytest.approx(decisions * p * (np.array(worth) - p @ worth), abs=1e-8 * decisions)


def test_branches_of_equal_decision_are_credited_with_what_each_earned() -> None:
    """p(high) .25; high earned 1 and 0, low 0 and 0: V = .125, and of 4 decisions each member counts 4 p / (1/2)."""
    members = [step(rung, [0.25, 0.75]) for rung in ("float", "int2", "float", "int2")]
    found = branch_advantages(members, [1, 0, 0, 0], 4, ("float", "int2"))
    assert found == pytest.approx([4 * 0.5 * 0.875, 4 * 1.5 * -0.125, 4 * 0.5 * -0.125, 4 * 1.5 * -0.125])


class Scripted:
    """Plays episodes of three steps; a resumed one takes what it is told, then int2. The reward is the member's number."""

    def __init__(self, forced: Sequence[int] = ()) -> None:
        self.forced, self.asked = forced, list[list[RolloutRequest]]()

    def __call__(self, runs: Sequence[RolloutRequest]) -> list[Trajectory]:
        self.asked.append(list(runs))
        return [self.episode(run) for run in runs]

    def episode(self, run: RolloutRequest) -> Trajectory:
        taken = (*run.taken, "int2", "int2")[:3] if isinstance(run, Resumed) else ("float", "int2", "int4")
        steps = [step(rung, [0.2, 0.3, 0.5], turn in self.forced) for turn, rung in enumerate(taken)]
        return Trajectory(run, "", steps, reward=float(run.member))


def test_a_branch_takes_what_its_episode_took_up_to_one_decision_and_learns_from_that_alone() -> None:
    play = Scripted(forced=[0, 1])
    whole, branched = play_groups(GAMES[:2], [False, True], 4, ROUTE, play, lambda episode: episode.reward, seed=0)
    first, second = play.asked
    assert [(run.task, run.member) for run in first] == [*((GAMES[0], m) for m in range(4)), (GAMES[1], 0)]
    rungs = ["float", "int4", "int2", "float"]
    assert second == [Resumed(GAMES[1], m, ("float", "int2", rung)) for m, rung in enumerate(rungs)]
    assert whole.rewards == [0, 1, 2, 3]
    assert whole.untrained == [frozenset({0, 1})] * 4
    assert (branched.turn, branched.untrained, len(branched.sampled)) == (2, [frozenset({0, 1})] * 4, 1)
    assert branched.rewards == branch_advantages([e.steps[2] for e in branched.episodes], [0, 1, 2, 3], 1, ROUTE)
    turns = {
        play_groups([GAMES[0]], [True], 3, ROUTE, Scripted(), lambda episode: episode.reward, seed)[0].turn
        for seed in range(30)
    }
    assert turns == {0, 1, 2}


def test_where_every_step_is_forced_there_is_nothing_to_branch() -> None:
    (group,) = play_groups([GAMES[0]], [True], 3, ROUTE, Scripted([0, 1, 2]), lambda episode: episode.reward, seed=0)
    assert group.tied
    assert group.rewards == [0.0] * 3
    assert group.untrained == [frozenset({0, 1, 2})] * 3


def test_tied_groups_give_way_to_others_of_their_kind_that_do_not_tie() -> None:
    def group(name: str, tied: bool, turn: int | None = None) -> Group:
        return Group([], [float(len(name))], tied, [], turn)

    groups = [group("a", True), group("bb", False), group("ccc", True, turn=1), group("dddd", True)]
    asked = []

    def again(games: Sequence[object], branched: Sequence[bool]) -> list[Group]:
        asked.append((games, branched))
        return [group("eeeee", True), group("ffffff", False, turn=0)]

    assert refilled(groups, GAMES[:2], again) == [*groups[:2], group("ffffff", False, turn=0), groups[3]]
    assert asked == [(GAMES[:2], [False, True])]
    assert refilled(groups[1:2], GAMES, again) == groups[1:2]
    assert len(asked) == 1


def test_a_resumed_episode_takes_its_first_decisions_as_told_and_then_draws() -> None:
    """The draws of the member, at the turns that are left."""
    router = random_router(scale=0.5)
    chooser, other = (_Chooser(router, sample=True, seed=3) for _ in range(2))
    chooser.begin(0, Resumed(GAMES[0], 1, taken=("int2", "float")))
    other.begin(0, RolloutRequest(GAMES[0], 1))
    told, drawn = [], []
    for _ in range(40):
        for one, rungs in ((chooser, told), (other, drawn)):
            rungs.append(one.choose([0], torch.zeros(1, 2))[0][0])
            one.acted(0)
    assert told == ["int2", "float", *drawn[2:]]
    assert set(drawn) == {"int2", "float"}


def section(**changes: object) -> GrpoRouter:
    return GrpoRouter.model_validate(tiny_recipe().grpo_router.model_dump() | changes)


def test_the_price_rises_by_what_is_spent_above_the_budget() -> None:
    ratio = section(budget={"ratio": 0.2, "rate": 0.5})
    assert next_price(0.3, 0.6, ratio) == pytest.approx(0.5)
    assert next_price(0.1, 0.0, section(budget={"ratio": 0.5})) == 0.0
    assert next_price(5.0, 0.9, ratio) > 5
    gated = section(budget={"cost": 0.2}, reward="gated", cost_weight=0.9)
    assert next_price(0.9, 2.0, gated) == 1.0


def test_dual_ascent_finds_the_price_at_which_a_responsive_spender_keeps_to_the_budget() -> None:
    """Who spends exp(-price) spends 0.2 at a price of log 5."""
    price, budget = 0.0, section(budget={"ratio": 0.2})
    for _ in range(200):
        price = next_price(price, float(np.exp(-price)), budget)
    assert price == pytest.approx(np.log(5), abs=1e-3)


def test_within_the_budget_success_counts_and_outside_of_it_what_is_too_much() -> None:
    budget = GrpoBudget(ratio=0.2)
    means = [{"success": s, "ratio": r, "cost": 9.0} for s, r in ((0.9, 0.3), (0.5, 0.2), (0.6, 0.1), (1.0, 0.21))]
    merits = [merit_within(one, budget) for one in means]
    assert np.argsort(merits).tolist() == [0, 3, 1, 2]
    assert merit_within(means[0] | {"cost": 0.4}, GrpoBudget(cost=0.5)) == 0.9


def test_entropy_is_that_of_the_choice() -> None:
    assert entropy(np.array([[0.5], [0.0], [0.25]])) == pytest.approx([np.log(2), 0, 0.5623], abs=1e-4)
    assert entropy(np.array([[1 / 3, 2 / 3]])) == pytest.approx(np.log(3))


def test_the_entropy_of_decisions_can_be_worth_something() -> None:
    rollouts = SimpleNamespace(route=("float", "int2"), cost=lambda *_: SimpleNamespace(total=0.5))
    steps = [step("float", [0.25, 0.75]), step("int2", [0.25, 0.75]), step("float", [1.0, 0.0], forced=True)]
    episode = Trajectory(RolloutRequest(GAMES[0]), "", steps, reward=1.0)
    scorer = Scorer(rollouts, None, section(reward="difference", entropy_weight=0.1))  # type: ignore[arg-type]
    surprise = -(np.log(0.25) + np.log(0.75)) / 2
    assert scorer.earned(episode, 0.2) == pytest.approx(1 - 0.2 * 0.5 + 0.1 * surprise)
    plain = Scorer(rollouts, None, section(reward="difference"))  # type: ignore[arg-type]
    assert plain.earned(episode, 0.2) == pytest.approx(0.9)


@pytest.fixture(scope="module")
def budgeted(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageResult]:
    folder = tmp_path_factory.mktemp("budgeted")
    changes = {"budget": {"ratio": 0.3, "rate": 1.0}, "branch_groups": 1, "refills": 1, "entropy_weight": 0.01}
    return folder, run_stage(artifacts, folder, **changes, start="untrained")


def test_the_stage_with_a_budget_branches_refills_and_new_weights(
    artifacts: Path, budgeted: tuple[Path, StageResult]
) -> None:
    folder, result = budgeted
    log = pl.read_parquet(folder / "output" / "training.parquet")
    assert log.schema == grpo.LOG
    prices = log["price"].drop_nulls().to_list()
    ratios = log.filter(pl.col("update") > 0)["ratio"].to_list()
    assert prices[0] == 1.0
    assert prices[1:] == pytest.approx([max(p + r - 0.3, 0) for p, r in zip(prices, ratios, strict=True)][:-1])
    trained = log.filter(pl.col("update") > 0)
    assert trained["entropy"].is_between(0.01, np.log(2) + 1e-9).all()
    assert trained["divergence"][-1] > 1e-5
    assert result.summary["target_ratio"] == 0.3
    assert result.summary["calibrated_validation_ratio"] <= 0.3
    stage_1 = load_router(artifacts / "kl_router" / ROUTER_FOLDER, CPU)
    router = load_router(folder / "output" / ROUTER_FOLDER, CPU)
    assert router.settings.scale == 1.0 != stage_1.settings.scale


def test_a_router_that_has_collapsed_stops_training(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grpo, "entropy", lambda levels: np.zeros(len(levels)))
    run_stage(artifacts, tmp_path)
    log = pl.read_parquet(tmp_path / "output" / "training.parquet")
    assert log["update"].to_list() == [0, 1]
    assert log["validation_reward"].null_count() == 0
    assert "after update 1 of 4 every decision is certain" in caplog.text
