"""Routers that decide after the draft: accepted or checked, at what price, and the same as before in all else."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from dmr_pipeline.recipe.kl_router import RouterModel
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.reading import NOTHING, Reading
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.router.kl import with_settings
from dmr_pipeline.router.model import Router, load_router, save_router, sequence_of_trajectory, with_features
from dmr_pipeline.router.policies import routing_policy
from tests.helpers.after_routers import PROBE, counting, informed, lm, probe
from tests.helpers.one_cache import roll_shared
from tests.helpers.rollouts import LOW, MODELS, PROMPTER, ROUTE, RUNS, THREE, greedy_uncached, roll, taken, transcript
from tests.helpers.routers import CPU

ROUTES = [ROUTE, THREE]


def played(router: Router, slots: int = 7, sample: bool = True, **changes: object) -> list[Trajectory]:
    route = router.settings.route
    return roll(routing_policy(router, slots, sample=sample, seed=3), slots, route=route, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "route"), [(probe, ROUTE), (informed, THREE), (counting, ROUTE), (lm, THREE)])
def test_at_a_threshold_of_0_it_is_the_dearest_rung_that_only_checks(make, route: Sequence[str]) -> None:
    everything = played(make(route, threshold=0.0), sample=False)
    assert taken(everything) == taken(roll(SinglePrecision("float", route), route=route))
    for one, other in zip(everything, roll(SinglePrecision("float", route, "int2"), route=route), strict=True):
        # A probe's look at the transcript is the first pass of the draft.
        assert [step.readings for step in one.steps] == [step.readings for step in other.steps]
        assert [(s.drafted, s.accepted) for s in one.steps] == [(s.drafted, s.accepted) for s in other.steps]
    assert any(step.accepted for trajectory in everything for step in trajectory.steps)
    nothing = played(make(route, threshold=1.0), sample=False)
    assert taken(nothing) == taken(roll(SinglePrecision("int2", route), route=route))


def cost_by_hand(trajectory: Trajectory, turn: int, seen: dict[str, int]) -> dict[str, Reading]:
    """What each rung's passes read in a step of which the cheapest drafts all; by plain forward passes over its transcript.

    Args:
        seen: tokens of the transcript that each rung's cache holds; updated.
    """
    step, text = trajectory.steps[turn], transcript(trajectory, turn)
    cheap, total = "int2", dict.fromkeys(MODELS, NOTHING)

    def read(rung: str, upto: int) -> None:
        """One pass over all that the rung lacks of the first tokens of the transcript with the action."""
        total[rung] += Reading(1, upto - seen.get(rung, 0), upto)
        seen[rung] = upto

    def write(rung: str, begun: list[int]) -> list[int]:
        action = greedy_uncached(MODELS[rung], text + begun)[: 6 - len(begun)]
        for n in range(len(action)):
            read(rung, len(text) + len(begun) + n)
        return action

    if step.precision == cheap:
        assert write(cheap, []) == step.action
        return total
    done: list[int] = []
    while len(done) < len(step.action):
        draft = write(cheap, done)
        pairs = zip(draft, step.action[len(done) :], strict=False)
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        complete = len(done) + len(draft) == 6 or draft[-1] == PROMPTER.action_end.token
        read(step.precision, len(text) + len(done) + len(draft) - complete)
        done = step.action[: len(done) + agreed + 1]
        # Both caches are cut to what is right, the dear one also before the token that it put after that.
        seen[step.precision] = min(seen[step.precision], len(text) + len(done) - 1)
        seen[cheap] = min(seen[cheap], len(text) + len(done) - 1)
    return total


@pytest.mark.parametrize(("make", "route"), [(probe, ROUTE), (informed, THREE), (counting, ROUTE), (lm, THREE)])
def test_every_pass_is_paid_once(make, route: Sequence[str]) -> None:
    acted = set()
    for trajectory in played(make(route, scale=0.5), runs=RUNS[:3]):
        seen: dict[str, int] = {}
        for turn, step in enumerate(trajectory.steps):
            expected = cost_by_hand(trajectory, turn, seen)
            assert dict(step.readings) == {rung: its for rung, its in expected.items() if its != NOTHING}
            assert step.action == greedy_uncached(MODELS[step.precision], transcript(trajectory, turn))
            assert step.router.passes == 1
            acted.add((step.precision, bool(step.drafted)))
    assert acted == {(rung, rung != "int2") for rung in route}


@pytest.mark.parametrize("make", [probe, informed, lm])
def test_it_takes_the_actions_of_the_same_router_before_the_draft_whatever_the_batch(make) -> None:
    after = make(scale=3.0)
    before = with_settings(after, decides="before")
    written = played(before, runs=RUNS[:4])
    assert taken(played(after, runs=RUNS[:4])) == taken(written) == taken(played(after, slots=1, runs=RUNS[:4]))
    assert not any(step.drafted for trajectory in written for step in trajectory.steps)


def test_where_nothing_can_be_checked_the_rung_that_is_named_acts_itself() -> None:
    router = probe(scale=3.0)
    after, before = (
        played(with_settings(router, decides=order), action="score", runs=RUNS[:3]) for order in ("after", "before")
    )
    assert [[step.readings for step in t.steps] for t in after] == [[step.readings for step in t.steps] for t in before]
    assert {step.precision for trajectory in after for step in trajectory.steps} == set(ROUTE)


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_with_one_cache_features_are_what_the_drafter_reads_where_others_have_checked(route: Sequence[str]) -> None:
    router = probe(route, scale=3.0)
    acted = [
        sequence_of_trajectory(trajectory, router)
        for trajectory in roll_shared(routing_policy(router, 7, sample=True, seed=3), route=route)
    ]
    bare, models = [replace(s, features=None) for s in acted], {rung: MODELS[rung] for rung in route}
    again = with_features(router, bare, 3, sharing=models)
    for one, other in zip(acted, again, strict=True):
        torch.testing.assert_close(one.features, other.features, atol=1e-4, rtol=1e-3)
    others = with_features(with_settings(router, decides="before"), bare, 3, sharing=models)
    assert any(not torch.allclose(s.features, o.features, atol=1e-3) for s, o in zip(acted, others, strict=True))  # type: ignore[arg-type]


def test_the_order_is_kept_with_the_weights_and_not_written_where_it_is_the_papers(tmp_path: Path) -> None:
    router = probe()
    save_router(router, tmp_path / "after")
    assert load_router(tmp_path / "after", CPU, LOW).settings == router.settings
    save_router(with_settings(router, decides="before"), tmp_path / "before")
    assert "decides" not in json.loads((tmp_path / "before" / "router.json").read_text())
    assert "decides" not in RouterModel(probe=PROBE).model_dump()


def test_a_draft_that_was_looked_at_and_cannot_be_checked_is_thrown_away_and_paid() -> None:
    drafted = roll(SinglePrecision("int2", ROUTE), action="score", runs=RUNS[:3])
    passes = {len(trajectory.steps[0].readings) for trajectory in drafted}
    assert passes == {1}
    for trajectory in played(informed(scale=3.0), action="score", runs=RUNS[:3]):
        for step in trajectory.steps:
            cheap = dict(step.readings)["int2"]
            assert cheap.passes > 1
            assert dict(step.readings).keys() == {step.precision, "int2"}
