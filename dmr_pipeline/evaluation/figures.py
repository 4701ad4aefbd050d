"""What pictures of training, labels and calibration show, as numbers: for the stills (plots.py) and for the report's own."""

from collections.abc import Mapping

import numpy as np
import polars as pl
from pydantic import JsonValue

from dmr_pipeline.evaluation.metrics import rounded
from dmr_pipeline.intervals import wilson
from dmr_pipeline.precision.hull import Floats

KL_FLOOR = 1e-6
"""Nats below which divergences are not told apart."""
_POINTS = 200
"""Of a long training's curve, at most."""


def figures(
    sensitivity: pl.DataFrame, kl_log: pl.DataFrame, grpo_log: pl.DataFrame, calibration: pl.DataFrame
) -> Mapping[str, JsonValue]:
    """JSON-ready: lists of rows.

    Args:
        sensitivity: as in `turns`.
        kl_log, grpo_log: both stages' `training.parquet`.
        calibration: columns probability, sensitive.
    """
    labels = calibration["sensitive"].cast(pl.Float64).to_numpy()
    binned = calibration_bins(calibration["probability"].to_numpy(), labels)
    found = {
        "kl_by_turn": turns(sensitivity).to_dicts(),
        "kl_training": thinned(kl_log).to_dicts(),
        "grpo_training": grpo_log.to_dicts(),
        "calibration": binned.to_dicts(),
    }
    return rounded(found)  # type: ignore[return-value]


def turns(sensitivity: pl.DataFrame) -> pl.DataFrame:
    """At each turn how far the precisions are apart, median and the middle four fifths, and the share labelled sensitive.

    Args:
        sensitivity: columns turn (from 0), kl_high_low (nats), sensitive (bool); a row a step and cheaper rung.
    """
    divergence = pl.col("kl_high_low").clip(lower_bound=KL_FLOOR)
    return (
        sensitivity.group_by("turn")
        .agg(
            median=divergence.median(),
            lower=divergence.quantile(0.1, "linear"),
            upper=divergence.quantile(0.9, "linear"),
            sensitive=pl.mean("sensitive"),
            steps=pl.len(),
        )
        .sort("turn")
    )


def calibration_bins(probabilities: Floats, labels: Floats, bins: int = 10) -> pl.DataFrame:
    """Mean predicted probability and observed share of sensitive steps in bins of equal count, with 95% Wilson intervals.

    Args:
        probabilities: predicted, [steps].
        labels: 0 or 1, [steps].
        bins: groups of steps with neighbouring probabilities.
    """
    order = np.argsort(probabilities, kind="stable")
    groups = [group for group in np.array_split(order, bins) if group.size]
    rows = [
        (
            float(probabilities[group].mean()),
            float(labels[group].mean()),
            *wilson(float(labels[group].mean()), group.size, 0.95),
            group.size,
        )
        for group in groups
    ]
    return pl.DataFrame(rows, schema=["predicted", "observed", "lower", "upper", "steps"], orient="row")


def thinned(log: pl.DataFrame) -> pl.DataFrame:
    """A long log's means over equally many updates: columns update (the last of them), loss."""
    if not log.height:
        return pl.DataFrame(schema={"update": pl.Int64, "loss": pl.Float64})
    each = -(-log.height // _POINTS)
    groups = log.with_row_index("row").group_by(pl.col("row") // each, maintain_order=True)
    return groups.agg(pl.last("update"), pl.mean("loss")).select("update", "loss")
