"""Estimates from logged episodes, on cases whose answer is known."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from dmr_pipeline.errors import UserError
from dmr_pipeline.router import off_policy
from dmr_pipeline.router.budgets import AtBar, Bar
from dmr_pipeline.router.off_policy import LoggedRun, chances_at, estimate

STEPS = 3


def dearer_at(target: float, hard: bool) -> float:
    """The target's chance of the dearer rung: `target` at hard steps, its half at others."""
    return target if hard else target / 2


def success(hard: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Every hard step that the cheaper rung takes halves the chance; dear steps at easy places change nothing."""
    return 0.9 * 0.5 ** ((hard == 1) & (taken == 1)).sum(axis=-1)


def truth(target: float) -> float:
    """By enumeration: each step is hard with a chance of 0.4."""
    total = 0.0
    for hard in itertools.product((0, 1), repeat=STEPS):
        for taken in itertools.product((0, 1), repeat=STEPS):
            chance = 1.0
            for h, a in zip(hard, taken, strict=True):
                dear = dearer_at(target, bool(h))
                chance *= (0.4 if h else 0.6) * (dear if a == 0 else 1 - dear)
            total += chance * float(success(np.array(hard), np.array(taken)))
    return total


def log_of(episodes: int, seed: int, target: float, behaviour: float = 0.5, blind: bool = False) -> list[LoggedRun]:
    rng, runs = np.random.default_rng(seed), []
    for i in range(episodes):
        hard = (rng.random(STEPS) < 0.4).astype(int)
        taken = (rng.random(STEPS) >= behaviour).astype(int)
        wanted = np.array([dearer_at(target, bool(h)) for h in hard])
        numbers = np.zeros((STEPS, 1)) if blind else hard[:, None].astype(float)
        runs.append(
            LoggedRun(
                f"game-{i // 2}", taken, np.where(taken == 0, behaviour, 1 - behaviour),
                np.stack([wanted, 1 - wanted], axis=1), numbers, float(rng.random() < success(hard, taken)),
            )
        )  # fmt: skip
    return runs


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_both_estimates_find_the_known_answer(target: float) -> None:
    """Their means over many logs are within four standard errors, and intervals hold it about as often as they say."""
    found = [estimate(log_of(300, seed, target)) for seed in range(8)]
    for kind in ("self_normalised", "doubly_robust"):
        values = np.array([getattr(one, kind).value for one in found])
        assert abs(values.mean() - truth(target)) < 4 * values.std(ddof=1) / len(values) ** 0.5
        held = sum(getattr(one, kind).low <= truth(target) <= getattr(one, kind).high for one in found)
        assert held >= 5


def test_the_doubly_robust_one_is_right_with_a_model_that_is_wrong_and_steadier_with_a_good_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spread(make: Callable[[int], list[LoggedRun]]) -> tuple[float, float]:
        values = np.array([off_policy._doubly_robust(make(seed), 0).mean() for seed in range(20)])
        return float(values.mean()), float(values.std(ddof=1))

    good, good_spread = spread(lambda seed: log_of(200, seed, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(off_policy, "_fitted", lambda runs: lambda columns: np.full(len(columns), 5.0))
        wrong, wrong_spread = spread(lambda seed: log_of(200, seed, 1.0))
    assert abs(good - truth(1.0)) < 4 * good_spread / 20**0.5
    assert abs(wrong - truth(1.0)) < 4 * wrong_spread / 20**0.5
    assert good_spread < wrong_spread


def test_the_logs_own_policy_is_its_mean() -> None:
    runs = log_of(100, 0, 0.3)
    same = [LoggedRun(r.game, r.taken, r.propensity, np.full((STEPS, 2), 0.5), r.numbers, r.outcome) for r in runs]
    found = estimate(same)
    assert found.effective == pytest.approx(100)
    assert found.self_normalised.value == pytest.approx(found.logged)
    assert found.logged == np.mean([r.outcome for r in runs])


def test_an_episode_that_nobody_decided_counts_as_it_ended() -> None:
    runs = log_of(100, 0, 0.3)
    same = [LoggedRun(r.game, r.taken, r.propensity, np.full((STEPS, 2), 0.5), r.numbers, r.outcome) for r in runs]
    nobody = LoggedRun("b", np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 2)), np.zeros((0, 1)), 1.0)
    found = estimate([*same, nobody])
    assert found.effective == pytest.approx(101)
    assert found.self_normalised.value == pytest.approx((sum(r.outcome for r in runs) + 1) / 101)


def test_what_the_log_cannot_tell_is_refused() -> None:
    with pytest.raises(UserError, match="no logged episode"):
        estimate([])
    with pytest.raises(UserError, match="tell as much as"):
        estimate(log_of(30, 0, 1.0))
    drawn = log_of(100, 0, 0.5)
    sure = [LoggedRun(r.game, r.taken, np.ones(STEPS), r.target, r.numbers, r.outcome) for r in drawn]
    with pytest.raises(UserError, match=r"300 of 300 logged steps nothing was drawn"):
        estimate(sure)


@pytest.mark.parametrize(
    "bar", [Bar(0.5), Bar(0.4, ties=0.3), Bar(0.5, sample=True), Bar(0.3, sample=True, strict=0.4)]
)
def test_chances_are_how_often_a_bar_takes_each_rung(bar: Bar) -> None:
    from dmr_pipeline.rollout.policy import Decision
    from dmr_pipeline.rollout.trajectory import RolloutRequest
    from dmr_pipeline.serve.sessions import Goal

    route, levels, counts = ("float", "int4", "int2"), (0.4, 0.7), dict.fromkeys(("float", "int4", "int2"), 0)

    class Levels:
        def begin(self, slot, run): ...
        def acted(self, slot, segment, precision, action): ...
        def decide(self, slots, segments, peek):
            return [Decision("float", levels)] * len(slots)

    policy = AtBar(Levels(), route, bar)
    for number in range(400):
        policy.begin(0, RolloutRequest(Goal(str(number), "", "")))
        (decision,) = policy.decide([0], [[]], None)
        counts[decision.precision] += 1
    chances = chances_at(bar, levels, route, 0, 0)
    assert sum(chances.values()) == pytest.approx(1)
    for rung, count in counts.items():
        chance = chances.get(rung, 0.0)
        assert abs(count - 400 * chance) <= 4 * (400 * chance * (1 - chance)) ** 0.5 + 1e-9
    if bar.strict is not None:
        assert chances_at(bar, levels, route, 4, 2) == {"int2": 1.0}
