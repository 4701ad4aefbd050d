import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.rollout.trajectory import RolloutRequest, Step, Trajectory
from dmr_pipeline.router.calibration import (
    OperatingPoint,
    auprc,
    auroc,
    brier,
    expected_calibration_error,
    find_threshold,
    platt,
)

predictions = (
    st.lists(st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.booleans()), min_size=10, max_size=40)
    .filter(lambda rows: len({positive for _, positive in rows}) == 2)
    .map(lambda rows: (np.array([score for score, _ in rows]), np.array([positive for _, positive in rows])))
)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.4, -1.5), (2.5, 0.7)])
def test_platt_recovers_known_parameters(scale: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0.5, 1.5, 60_000)
    labels = rng.random(60_000) < expit(scale * margins + offset)
    found, offsets = platt(margins[:, None], labels.astype(int))
    assert [found, *offsets] == pytest.approx([scale, offset], abs=0.06)


def test_platt_stays_finite_where_classes_are_separated() -> None:
    scale, (offset,) = platt(np.array([[-2.0], [-1.0], [1.0], [3.0]]), np.array([0, 0, 1, 1]))
    assert 0 < scale < 10
    assert expit(scale * 3 + offset) == pytest.approx(3 / 4, abs=0.1)  # Platt's target for 2 positives


@given(predictions)
def test_auroc_is_the_share_of_ordered_pairs(rows: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = rows
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels] for n in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(np.mean(pairs))


@given(predictions)
def test_auprc_is_the_area_under_the_steps(rows: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = rows
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        recall = labels[chosen].sum() / labels.sum()
        area += (recall - before) * labels[chosen].mean()
        before = recall
    assert auprc(scores, labels) == pytest.approx(area)


@given(predictions)
def test_brier_and_calibration_error_by_hand(rows: tuple[np.ndarray, np.ndarray]) -> None:
    probabilities, labels = rows
    assert brier(probabilities, labels) == pytest.approx(np.mean([(p - y) ** 2 for p, y in zip(*rows, strict=True)]))
    ranked = sorted(range(len(labels)), key=lambda i: (probabilities[i], i))
    small, extra = divmod(len(ranked), 10)
    error, start = 0.0, 0
    for group in range(10):
        members = ranked[start : start + small + (group < extra)]
        start += len(members)
        gap = np.mean(probabilities[members]) - np.mean(labels[members])
        error += len(members) / len(ranked) * abs(gap)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(error)


@pytest.mark.parametrize("target", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
def test_threshold_meets_the_spend_in_closed_loop(target: float, power: float) -> None:
    """A world in which the router, acting, meets other states: a known function of the open-loop share."""
    probabilities = np.random.default_rng(1).beta(1, 4, 5000)

    def play_at(threshold: float) -> OperatingPoint:
        share = float((probabilities >= threshold).mean())
        return OperatingPoint(threshold, share**power, 0.5, 1000)

    best, tried = find_threshold(play_at, probabilities, target)
    assert target - 0.03 <= best.spend <= target
    assert best in tried
    assert len(tried) <= 5
    assert tried[0].threshold == pytest.approx(np.quantile(probabilities, 1 - (target - 0.01)))
    assert (len(tried) == 1) == (power == 1.0)  # open loop is right at once where nothing changes


@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=30),
    st.floats(0.001, 0.999),
    st.floats(0.2, 5),
    st.floats(0, 0.4),
)
def test_a_ratio_that_is_asked_for_means_at_most(
    levels: list[float], target: float, power: float, forced: float
) -> None:
    """Few levels with jumps between them, and steps that are forced whatever the threshold: if any threshold spends no more than
    the target, so does the one that is found; if none does, it is the one that spends least."""
    scores = np.array(levels)

    def spend(threshold: float) -> float:
        return forced + (1 - forced) * float((scores >= threshold).mean()) ** power

    best, tried = find_threshold(lambda at: OperatingPoint(at, spend(at), 0.5, 10), scores, target)
    assert best in tried
    assert len(tried) <= 6
    if forced <= target:
        assert best.spend == max(point.spend for point in tried if point.spend <= target)
    else:
        assert best.spend == forced


def test_an_operating_point_is_the_mean_over_steps_and_episodes() -> None:
    """Two episodes of different lengths: a step counts the same in both."""

    def episode(reward: float, *precisions: str) -> Trajectory:
        steps = [Step([1], [2], "look", "", precision, (0.5, 0.5), 1) for precision in precisions]
        return Trajectory(RolloutRequest(generate_game(0)[0]), "", steps, reward)

    played = [episode(1.0, "float", "int4", "int2"), episode(0.0, "int4")]
    point = OperatingPoint.of(0.3, played, {"float": 1.0, "int4": 0.2, "int2": 0.0})
    assert (point.threshold, point.success, point.steps) == (0.3, 0.5, 4)
    assert point.spend == pytest.approx((1 + 0.2 + 0 + 0.2) / 4)
