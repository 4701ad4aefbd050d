"""Great Expectations suites for the tabular artifacts. Imported lazily: the library alone takes seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

import great_expectations as gx
import great_expectations.expectations as gxe
import polars as pl
from great_expectations.core import ExpectationValidationResult
from great_expectations.expectations.expectation import Expectation

KL_SLACK = 1e-6
"""nats; a KL is never negative, but its float sum may be, by rounding."""


@dataclass(frozen=True)
class Validation:
    success: bool
    failures: tuple[str, ...]
    """One line a failed expectation: what was expected of which column, and what was found."""
    expectations: int


def validate_sensitivity_steps(
    steps: pl.DataFrame, task_types: Sequence[str], label_share: tuple[float, float]
) -> Validation:
    """`sensitivity_dataset/steps.parquet`: a row a step and cheaper rung, sane divergences, labels neither rare nor the rule."""
    lowest, highest = label_share
    return _validate(
        steps,
        [
            *(
                gxe.ExpectColumnValuesToBeBetween(column=name, min_value=-KL_SLACK)
                for name in ("kl_high_low", "kl_low_high", "js")
            ),
            gxe.ExpectCompoundColumnsToBeUnique(column_list=["episode_id", "turn", "precision"]),
            gxe.ExpectColumnValuesToBeInSet(column="task_type", value_set=list(task_types)),
            gxe.ExpectColumnMeanToBeBetween(column="sensitive", min_value=lowest, max_value=highest),
        ],
    )


def validate_trajectory_steps(steps: pl.DataFrame) -> Validation:
    """`trajectories/steps.parquet`: one row a step of an episode, complete."""
    return _validate(
        steps,
        [
            gxe.ExpectCompoundColumnsToBeUnique(column_list=["episode_id", "turn"]),
            gxe.ExpectColumnValuesToBeBetween(column="turn", min_value=0),
        ],
    )


def validate_trajectory_episodes(episodes: pl.DataFrame, task_types: Sequence[str]) -> Validation:
    """`trajectories/episodes.parquet`: one row an episode."""
    return _validate(
        episodes,
        [
            gxe.ExpectColumnValuesToBeUnique(column="episode_id"),
            gxe.ExpectColumnValuesToBeInSet(column="task_type", value_set=list(task_types)),
        ],
    )


def _validate(frame: pl.DataFrame, expectations: Sequence[Expectation]) -> Validation:
    """Null and NaN are looked for in polars first, since pandas cannot tell them apart."""
    columns = list(dict.fromkeys(column for expectation in expectations for column in _columns(expectation)))
    failures = [f"column {name!r} is missing" for name in columns if name not in frame.columns]
    failures += [f"{name}: {count} null or NaN" for name, count in _gaps(frame).items()]
    if frame.is_empty():
        failures.append("the table is empty")
    if failures:
        return Validation(False, tuple(failures), len(expectations))
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    batch = (
        context.data_sources.add_pandas("artifact")
        .add_dataframe_asset("table")
        .add_batch_definition_whole_dataframe("all")
        .get_batch({"dataframe": frame.select(columns).to_pandas()})
    )
    result = batch.validate(gx.ExpectationSuite(name="suite", expectations=list(expectations)))
    return Validation(
        bool(result.success),
        tuple(_explain(outcome) for outcome in result.results if not outcome.success),
        len(expectations),
    )


def _columns(expectation: Expectation) -> list[str]:
    arguments = expectation.configuration.kwargs
    return [arguments["column"]] if "column" in arguments else list(arguments["column_list"])


def _gaps(frame: pl.DataFrame) -> dict[str, int]:
    """Nulls and NaNs of each column that has any."""
    counts = {
        name: frame[name].null_count() + (int(frame[name].is_nan().sum()) if dtype.is_float() else 0)
        for name, dtype in frame.schema.items()
    }
    return {name: count for name, count in counts.items() if count}


def _explain(outcome: ExpectationValidationResult) -> str:
    """One line: the expectation, its arguments, and what was found instead."""
    config = outcome.expectation_config
    arguments = {key: value for key, value in config.kwargs.items() if key != "batch_id"}
    found = {key: value for key, value in outcome.result.items() if key in ("observed_value", "unexpected_count")}
    return f"{config.type}({', '.join(f'{key}={value}' for key, value in sorted(arguments.items()))}): found {found}"
