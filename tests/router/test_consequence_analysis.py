"""What predicts need, against pair counts, SciPy and tables whose answer is known."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from dmr_pipeline.router.calibration import auprc, auroc
from dmr_pipeline.router.consequence import label_of
from dmr_pipeline.router.consequence_analysis import (
    LEAST_POSITIVES,
    analyse,
    one_swap,
    weighted_auroc,
    weighted_average_precision,
    weighted_rank_correlation,
)
from tests.helpers.consequences import labelled_steps

ROWS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-1, 1), st.integers(0, 3)), min_size=1, max_size=25
)  # score, effect, how often it is there


@given(ROWS)
def test_resampled_numbers_are_those_of_the_repeated_rows(rows: list[tuple[int, int, int]]) -> None:
    scores, effect, times = (np.array(column) for column in zip(*rows, strict=True))
    scores, effect, weights = scores.astype(float), effect.astype(float), times[None].astype(float)
    repeated, effects = np.repeat(scores, times), np.repeat(effect, times)
    positives, negatives = repeated[effects == 1], repeated[effects != 1]
    found = weighted_auroc(scores, effect == 1, weights)[0]
    pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    if pairs:
        assert found == pytest.approx(np.mean(pairs))
        assert found == pytest.approx(auroc(repeated, effects == 1))
    else:
        assert np.isnan(found)
    found = weighted_average_precision(scores, effect == 1, weights)[0]
    assert np.isnan(found) if not len(positives) else found == pytest.approx(auprc(repeated, effects == 1))
    found = weighted_rank_correlation(scores, effect, weights)[0]
    if len(set(repeated)) > 1 and len(set(effects)) > 1:
        assert found == pytest.approx(spearmanr(repeated, effects).statistic)
    else:
        assert np.isnan(found)


def test_one_swap_saves_the_games_that_it_decides() -> None:
    """Of ten games of four steps two are won anyway, and three are lost but for one step, of which one has two such."""
    decisive = {(2, 1), (3, 0), (4, 2), (4, 3), (0, 1)}
    table = labelled_steps(np.zeros(40, bool), np.zeros(40), per_game=4).with_columns(
        policy=pl.lit("low"),
        success=pl.col("task_id").cast(int) < 2,
        high_success=pl.Series([(i // 4, i % 4) in decisive for i in range(40)]),
    )
    found = one_swap(table, seed=0)
    assert found is not None
    assert (found.games, found.won.value, found.won_with_one.value) == (10, 0.2, 0.5)
    assert found.ratio == pytest.approx(3 / 40)
    assert 0.1 < found.won_with_one.low < 0.5 < found.won_with_one.high < 0.9
    unplayed = table.with_columns(high_success=pl.lit(None, pl.Boolean))
    assert one_swap(unplayed, seed=0).won_with_one.value == 0.2  # type: ignore[union-attr]
    assert one_swap(table.with_columns(policy=pl.lit("high")), seed=0) is None


def test_parts_and_refusals() -> None:
    needed = np.arange(200) % 20 == 7  # ten, in every other game, at turn 7
    parts = analyse(labelled_steps(needed, needed.astype(float)), seed=0, resamples=50)
    assert [(part.among, part.where, part.steps, part.needed) for part in parts] == [
        (among, where, steps, count)
        for among in ("all steps", "actions differ")
        for where, steps, count in (
            ("everywhere", 200, 10),
            ("turns 0-4", 100, 0),
            ("turns 5-14", 100, 10),
            ("from turn 15", 0, 0),
            ("even", 100, 10),
            ("odd", 100, 0),
        )
    ]
    for part in parts:
        assert (part.refusal is None) == bool(part.predictions) == (part.needed >= LEAST_POSITIVES)
    everywhere = {row.predictor: row for row in parts[0].predictions}
    assert set(everywhere) == {
        "KL(high||low)",
        "KL(low||high)",
        "JS",
        "entropy of the draft",
        "minus the turn",
    }, "the others are the same everywhere, or unknown"
    perfect = everywhere["KL(high||low)"]
    for estimate in (perfect.auroc, perfect.average_precision, perfect.rank_correlation):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 1, 1))
    assert "0 of 100 steps" in str(parts[1].refusal)


def test_the_effect_counts_harm_and_need_apart() -> None:
    kl = np.linspace(0, 1, 60)
    frame = labelled_steps(np.arange(60) >= 40, kl)
    harmful = pl.int_range(pl.len()) < 20
    frame = frame.with_columns(high_success=~harmful, low_success=pl.col("low_success") | harmful).with_columns(
        label=label_of()
    )
    part = analyse(frame, seed=0, resamples=20)[0]
    assert (part.needed, part.harmful) == (20, 20)
    effect = np.repeat([-1, 0, 1], 20)
    assert part.predictions[0].rank_correlation.value == pytest.approx(spearmanr(kl, effect).statistic)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Scores of needed steps are normal around 1, of the others around 0: the AUROC is Phi(1 / sqrt 2) = .7602. All steps of a
    game are alike, so that an interval over steps would be far too narrow."""
    rng, held = np.random.default_rng(5), 0
    others = [pl.lit(0.0).alias(name) for name in ("kl_low_high", "js", "entropy_low")]
    for draw in range(30):
        by_game = rng.random(50) < 0.4
        kl = rng.normal(by_game.astype(float))
        frame = labelled_steps(np.repeat(by_game, 3), np.repeat(kl, 3), per_game=3).with_columns(
            *others, turn=0, task_type=pl.lit("one")
        )
        estimate = analyse(frame, draw, 100)[0].predictions[0].auroc
        held += estimate.low <= 0.7602 <= estimate.high
    assert 26 <= held <= 30


def test_the_same_seed_gives_the_same() -> None:
    rng = np.random.default_rng(0)
    frame = labelled_steps(rng.random(100) < 0.3, rng.random(100))
    assert analyse(frame, 1, 50) == analyse(frame, 1, 50) != analyse(frame, 2, 50)
