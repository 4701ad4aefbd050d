from typing import get_args

import polars as pl
import pytest

from dmr_pipeline.defs.expectations import (
    validate_sensitivity_steps,
    validate_trajectory_episodes,
    validate_trajectory_steps,
)
from dmr_pipeline.environments.alfworld.game import TaskType

TYPES = get_args(TaskType)
SHARE = (0.2, 0.5)


def steps() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "episode_id": ["a", "a", "b", "b"],
            "turn": [0, 1, 0, 1],
            "precision": ["int2"] * 4,
            "task_type": [TYPES[0], TYPES[0], TYPES[5], TYPES[5]],
            "kl_high_low": [0.0, 1.5, -1e-8, 0.2],
            "kl_low_high": [0.0, 1.5, 0.0, 0.2],
            "js": [0.0, 0.5, 0.0, 0.1],
            "sensitive": [False, True, False, False],
        }
    )


def test_a_sane_dataset_passes():
    assert validate_sensitivity_steps(steps(), TYPES, SHARE).success


@pytest.mark.parametrize(
    ("column", "values", "explained"),
    [
        ("kl_high_low", [0.0, -1e-3, 0.0, 0.0], "expect_column_values_to_be_between.*kl_high_low"),
        ("kl_low_high", [0.0, -1e-3, 0.0, 0.0], "expect_column_values_to_be_between.*kl_low_high"),
        ("js", [0.0, -1e-3, 0.0, 0.0], "expect_column_values_to_be_between.*js"),
        ("kl_high_low", [0.0, float("nan"), 0.0, 0.0], "kl_high_low: 1 null or NaN"),
        ("js", [None, None, 0.0, 0.0], "js: 2 null or NaN"),
        ("turn", [0, 0, 0, 1], "expect_compound_columns_to_be_unique"),
        ("task_type", [TYPES[0], TYPES[0], "cook", TYPES[5]], "expect_column_values_to_be_in_set"),
        ("sensitive", [False] * 4, "expect_column_mean_to_be_between.*0.0"),
        ("sensitive", [True] * 4, "expect_column_mean_to_be_between.*1.0"),
    ],
)
def test_each_expectation_of_the_sensitivity_dataset_can_fail(column: str, values: list[object], explained: str):
    harmed = steps().with_columns(pl.Series(column, values))
    validation = validate_sensitivity_steps(harmed, TYPES, SHARE)
    assert not validation.success
    assert len(validation.failures) == 1
    assert pl.Series(validation.failures).str.contains(explained).all(), validation.failures


def test_a_step_has_a_row_for_each_cheaper_rung():
    of_three = pl.concat([steps(), steps().with_columns(precision=pl.lit("int4"))])
    assert validate_sensitivity_steps(of_three, TYPES, SHARE).success
    (failure,) = validate_sensitivity_steps(pl.concat([of_three, of_three.head(1)]), TYPES, SHARE).failures
    assert "expect_compound_columns_to_be_unique" in failure


def test_missing_columns_and_empty_tables_fail():
    assert validate_sensitivity_steps(steps().drop("js"), TYPES, SHARE).failures == ("column 'js' is missing",)
    assert validate_sensitivity_steps(steps().clear(), TYPES, SHARE).failures == ("the table is empty",)


def test_trajectories():
    episodes = pl.DataFrame({"episode_id": ["a", "b"], "task_type": TYPES[:2]})
    assert validate_trajectory_steps(steps()).success
    assert validate_trajectory_episodes(episodes, TYPES).success
    assert not validate_trajectory_steps(pl.concat([steps(), steps()])).success
    assert not validate_trajectory_steps(steps().with_columns(turn=pl.col("turn") - 1)).success
    assert not validate_trajectory_episodes(pl.concat([episodes, episodes]), TYPES).success
    assert not validate_trajectory_episodes(episodes.with_columns(task_type=pl.lit("cook")), TYPES).success
