"""Routing over any number of rungs: what it computes, against closed forms, and that of two rungs it is what two alone need."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, rel_entr, softmax

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.rollout.policy import Decision, Draft, Forced, SinglePrecision, certain
from dmr_pipeline.rollout.reading import Reading
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.baselines import Confidence, Disagreement, RandomMixing, two_way_shares
from dmr_pipeline.router.calibration import exceedances, platt
from dmr_pipeline.router.grpo import divergence, tilt_for
from dmr_pipeline.router.labels import step_classes
from dmr_pipeline.router.model import RouterSettings, log_probabilities

ROUTE = ("float", "int4", "int2")
SPEND = np.array([0.1, 1.0])
"""Of the rungs from the second cheapest up."""


def settings(rungs: int, **changes: object) -> RouterSettings:
    tokens = {rung: 10 + k for k, rung in enumerate(("float", "int8", "int4", "int2")[-rungs:])}
    return RouterSettings.model_validate({"tokens": tokens, **changes})


def scores(steps: int, rungs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (steps, rungs - 1))


@pytest.mark.parametrize("rungs", [2, 3, 4])
def test_probabilities_are_the_softmax_of_the_scores(rungs: int) -> None:
    logits = torch.randn(50, rungs, dtype=torch.double, generator=torch.Generator().manual_seed(rungs)) * 4
    router = settings(rungs, scale=0.7)
    router = router.model_copy(update={"offsets": dict(zip(router.route[:-1], (0.5, -1.0, 2.0), strict=False))})
    shifts = np.array([0.0, *router.shifts])
    margins = (logits - logits[:, :1]).numpy()
    expected = softmax(0.7 * margins + shifts, axis=1)  # cheapest first
    assert log_probabilities(router.scores(logits)).exp().numpy() == pytest.approx(expected, abs=1e-12)
    reached = np.cumsum(expected[:, ::-1], axis=1)[:, :-1]  # dearest first
    assert router.exceedance(logits).numpy() == pytest.approx(reached, abs=1e-12)
    assert exceedances(0.7 * margins[:, 1:] + shifts[1:]) == pytest.approx(reached, abs=1e-12)


def test_of_two_rungs_they_are_sigmoids_bit_by_bit() -> None:
    logits = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 5
    router = settings(2, scale=1.3, offsets={"int4": -0.4})
    score = 1.3 * (logits[:, 1] - logits[:, 0]) - 0.4
    both = log_probabilities(router.scores(logits))
    assert torch.equal(both[:, 1], torch.nn.functional.logsigmoid(score))
    assert torch.equal(both[:, 0], torch.nn.functional.logsigmoid(-score))
    assert torch.equal(router.exceedance(logits)[:, 0], torch.sigmoid(score))


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_never_takes_a_dearer_rung(weights: list[float], one: float, other: float) -> None:
    router = settings(3)
    reached = (np.cumsum(weights) / sum(weights))[:-1].tolist()
    places = [router.route.index(router.choose(reached, bar)) for bar in sorted((one, other))]
    assert places == sorted(places)
    assert router.choose(reached, 0.0) == router.route[0]
    assert router.choose(reached, 1.1) == router.route[-1]


def test_the_threshold_one_half_takes_the_median_rung() -> None:
    router = settings(3)
    assert router.route == ("int8", "int4", "int2")
    assert router.choose((0.6, 0.9), 0.5) == "int8"
    assert router.choose((0.3, 0.6), 0.5) == "int4"
    assert router.choose((0.3, 0.4), 0.5) == "int2"


@pytest.mark.parametrize("rungs", [2, 3, 4])
def test_platt_scaling_is_the_maximum_of_the_smoothed_likelihood(rungs: int) -> None:
    margins = scores(400, rungs)
    padded = np.concatenate([np.zeros((400, 1)), margins], axis=1)
    chance = softmax(0.5 * padded + np.arange(rungs) * 0.3, axis=1)
    classes = np.array([np.random.default_rng(i).choice(rungs, p=chance[i]) for i in range(400)])
    counts = np.bincount(classes, minlength=rungs)
    targets = np.array([[(counts[c] * (k == c) + 1) / (counts[c] + rungs) for k in range(rungs)] for c in classes])

    def loss(parameters: np.ndarray) -> float:
        scaled = parameters[0] * padded + np.array([0.0, *parameters[1:]])
        return float(-(targets * log_softmax(scaled, axis=1)).sum(1).mean())

    best = minimize(loss, np.array([1.0] + [0.0] * (rungs - 1)), tol=1e-12)
    scale, offsets = platt(margins, classes)
    assert loss(np.array([scale, *offsets])) <= best.fun + 1e-10
    assert [scale, *offsets] == pytest.approx(best.x.tolist(), abs=1e-3)


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.95])
def test_a_tilt_gives_the_mean_spend(ratio: float) -> None:
    s = scores(200, 3)
    tilt = tilt_for(s, SPEND, ratio)
    shares = softmax(np.concatenate([np.zeros((200, 1)), s + tilt * SPEND], axis=1), axis=1)
    assert (shares[:, 1:] @ SPEND).mean() == pytest.approx(ratio, abs=1e-9)


@pytest.mark.parametrize("rungs", [2, 3])
def test_divergence_is_kl_between_the_choices(rungs: int) -> None:
    one, other = scores(30, rungs, 1), scores(30, rungs, 2)
    p, q = (softmax(np.concatenate([np.zeros((30, 1)), s], axis=1), axis=1) for s in (one, other))
    assert divergence(exceedances(one), other) == pytest.approx(rel_entr(p, q).sum(1), abs=1e-9)


def test_a_steps_class_is_the_cheapest_rung_that_is_not_sensitive() -> None:
    rows = [
        ("a", 0, "int4", False, "int2", False, 0),
        ("a", 1, "int4", False, "int2", True, 1),
        ("a", 2, "int4", True, "int2", True, 2),
        ("b", 0, "int4", True, "int2", False, 0),
    ]
    table = pl.DataFrame(
        [(e, t, rung, yes) for e, t, *pairs, _ in rows for rung, yes in zip(pairs[::2], pairs[1::2], strict=True)],
        schema=["episode_id", "turn", "precision", "sensitive"],
        orient="row",
    )
    assert step_classes(table, ROUTE).rows() == [(e, t, rung) for e, t, *_, rung in rows]


@dataclass
class FakePeek:
    """Each rung's action and margin, the same for all slots of one number."""

    actions: dict[str, dict[int, tuple[list[int], float]]]
    asked: list[tuple[str, list[int]]]

    def drafts(self, precision: str, slots: Sequence[int]) -> list[Draft]:
        self.asked.append((precision, list(slots)))
        return [Draft(self.actions[precision][slot][0], Reading(1), self.actions[precision][slot][1]) for slot in slots]

    def admissible_commands(self, slots: Sequence[int]) -> list[Sequence[str]]:
        return [["search[x]"] if slot % 2 else ["look"] for slot in slots]


PEEK = {
    "float": {slot: ([1, 1], 0.9) for slot in range(4)},
    "int4": {0: ([1, 1], 0.9), 1: ([1, 1], 0.9), 2: ([2], 0.2), 3: ([2], 0.9)},
    "int2": {0: ([1, 1], 0.8), 1: ([3, 3, 3], 0.1), 2: ([3], 0.1), 3: ([1, 1], 0.1)},
}


def test_the_cascade_goes_up_the_ladder_as_long_as_drafts_are_in_doubt() -> None:
    peek = FakePeek(PEEK, [])
    decisions = Confidence(ROUTE, 0.5).decide(range(4), [[]] * 4, peek)  # type: ignore[arg-type]
    assert [d.precision for d in decisions] == ["int2", "int4", "float", "int4"]
    assert all(decision.charged for decision in decisions)
    assert peek.asked == [("int2", [0, 1, 2, 3]), ("int4", [1, 2, 3])]
    assert decisions[2].exceedance == pytest.approx((0.8, 0.9))
    assert decisions[1].exceedance == pytest.approx((0.1, 0.9))
    for decision in decisions:  # a dearer rung is never wanted more than a cheaper one
        assert decision.exceedance[0] <= decision.exceedance[1]


def test_the_oracle_takes_the_cheapest_rung_that_agrees_with_the_dearest() -> None:
    decisions = Disagreement(ROUTE).decide(range(4), [[]] * 4, FakePeek(PEEK, []))  # type: ignore[arg-type]
    assert [d.precision for d in decisions] == ["int2", "int4", "float", "int2"]


def test_random_mixing_keeps_its_shares() -> None:
    shares = {"float": 0.2, "int4": 0.5, "int2": 0.3}
    policy, game = RandomMixing(shares, 0), generate_game(0)[0]
    policy.begin(0, RolloutRequest(game))
    drawn = [policy.decide([0], [[]], FakePeek({}, []))[0] for _ in range(4000)]  # type: ignore[arg-type]
    for rung, share in shares.items():
        assert np.mean([d.precision == rung for d in drawn]) == pytest.approx(share, abs=0.03)
    assert drawn[0].exceedance == pytest.approx((0.2, 0.7))


def test_a_rule_decides_where_it_holds_and_the_policy_elsewhere() -> None:
    heard = []

    class Listening(SinglePrecision):
        def decide(self, slots, segments, peek):  # type: ignore[no-untyped-def]
            heard.append((list(slots), list(segments)))
            return super().decide(slots, segments, peek)

    peek = FakePeek({}, [])
    rule = Forced(Listening("int2", ROUTE), "float", ROUTE, lambda slots, peek: [slot % 2 == 1 for slot in slots])
    decisions = rule.decide([0, 1, 2, 3], [[0], [1], [2], [3]], peek)  # type: ignore[arg-type]
    assert [d.precision for d in decisions] == ["int2", "float", "int2", "float"]
    assert [d.forced for d in decisions] == [False, True, False, True]
    assert heard == [([0, 2], [[0], [2]])]
    assert rule.decide([1], [[1]], peek) == [Decision("float", (1.0, 1.0), forced=True)]  # type: ignore[arg-type]
    assert len(heard) == 1  # nobody was asked


def test_what_is_certain() -> None:
    assert [certain(rung, ROUTE) for rung in ROUTE] == [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]
    assert certain("int8", ROUTE) == ()
    assert two_way_shares(ROUTE, 0.25) == {"float": 0.25, "int4": 0.0, "int2": 0.75}


def test_of_two_rungs_a_tilt_is_the_offset_of_a_sigmoid() -> None:
    s = scores(300, 2)
    tilt = tilt_for(s, np.array([1.0]), 0.3)
    assert expit(s[:, 0] + tilt).mean() == pytest.approx(0.3, abs=1e-9)
