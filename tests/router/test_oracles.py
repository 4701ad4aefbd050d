"""Oracles at a bar: levels as the labels' own measure has them, in any batch, whoever acted."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from dmr_pipeline.recipe.evaluation import OracleName
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.router.budgets import AtBar, Bar, Lot
from dmr_pipeline.router.labels import measure
from dmr_pipeline.router.oracles import Oracle
from tests.helpers.one_cache import roll_shared
from tests.helpers.rollouts import ALL_LOW, ROUTE, RUNS, THREE, roll, rollouts_of, taken

NAMES = get_args(OracleName)


def played(name: OracleName, bar: Bar, route=ROUTE, slots: int = 4) -> list[Trajectory]:
    oracle = Oracle(rollouts_of(route), name, "action", slots)
    return roll(AtBar(oracle, route, bar, seed=1), slots, runs=RUNS[:4], route=route)


@pytest.mark.parametrize("route", [ROUTE, THREE], ids=len)
@pytest.mark.parametrize("name", NAMES)
def test_levels_are_those_of_the_labels(name: OracleName, route: tuple[str, ...]) -> None:
    trajectories = played(name, Lot(0.0, ties=0.5), route)
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    assert {step.precision for step in steps} == {route[0], route[-1]}
    rows = measure(rollouts_of(route), *to_frames(trajectories, "oracle"), "action").steps.filter(precision="int2")
    apart = (~rows["greedy_agree"]).to_numpy()
    assert 0 < apart.sum() < len(apart)
    kl = rows["kl_high_low"].to_numpy()
    expected = apart.astype(float) if name == "disagreement" else 1 - np.exp(-kl)
    assert [step.exceedance[0] for step in steps] == pytest.approx(expected, abs=1e-4)
    assert not any(step.besides for step in steps), "it asks nothing of those that act"


@pytest.mark.parametrize(("name", "bar"), [("disagreement", 0.5), ("divergence", 0.3)])
def test_batches_do_not_matter_and_a_bar_that_nothing_reaches_leaves_the_cheapest(name: OracleName, bar: float) -> None:
    some = played(name, Bar(bar))
    assert taken(some) == taken(played(name, Bar(bar), slots=1))
    assert taken(played(name, Bar(1.0, ties=0.0))) == taken(roll(ALL_LOW, runs=RUNS[:4]))
    levels = [(step.precision, step.exceedance[0]) for trajectory in some for step in trajectory.steps]
    assert all((rung == "float") == (level > bar) for rung, level in levels)
    assert len({rung for rung, _ in levels}) == 2


def test_with_one_cache_it_goes_on_from_what_those_have_read_that_acted() -> None:
    rollouts = replace(rollouts_of(ROUTE), shared_cache=True)
    policy = AtBar(Oracle(rollouts, "divergence", "action", len(RUNS)), ROUTE, Lot(0.0, ties=0.5), seed=1)
    trajectories = roll_shared(policy)
    rows = measure(rollouts, *to_frames(trajectories, "oracle"), "action").steps
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    assert [step.exceedance[0] for step in steps] == pytest.approx(
        1 - np.exp(-rows["kl_high_low"].to_numpy()), abs=1e-4
    )
