"""What a dearer rung is worth at a step, from steps that were swapped: a target of stage 1, beside that of advantage.py.

Where the actions of rung k and of the cheapest differ, the effect is the success of the one minus that of the other, each played
on under the stated continuation: 1 where rung k is needed, -1 where it does harm, mostly 0. A step that was drawn counts for as
many as it was drawn from (inverse propensity), so that the least weighted square of what a router's margin is off the effect by
finds its mean over all steps that look alike. Where all rungs act alike the effect is 0 for sure under greedy acting; such steps
are learned from too, since a router that decides before the draft cannot tell them. All of this is ours.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from dmr_pipeline.errors import UserError

COLUMNS = ("episode_id", "turn", "precision", "greedy_agree", "high_success", "low_success", "propensity")
"""That are looked at, of `evaluation.consequence.SWAPPED`."""


def read_swapped(folder: Path) -> pl.DataFrame:
    """
    Args:
        folder: of the artifact `sensitivity_dataset`.

    Raises:
        UserError: it has no steps that were swapped, or the table is not what it should be.
    """
    path = folder / "consequences.parquet"
    if not path.is_file():
        raise UserError(
            "kl_router.target: consequence learns from steps that were swapped, and sensitivity_dataset has none; give"
            " sensitivity.consequences too"
        )
    table = pl.read_parquet(path)
    if missing := set(COLUMNS) - set(table.columns):
        raise UserError(f"{path}: there is no column {min(missing)!r}; make it anew")
    return table.select(COLUMNS)


def steps_of(steps: pl.DataFrame, swapped: pl.DataFrame) -> pl.DataFrame:
    """The steps of those episodes of which any step was swapped or looked at."""
    return steps.join(swapped, on="episode_id", how="semi", maintain_order="left")


def targets(steps: pl.DataFrame, swapped: pl.DataFrame, route: Sequence[str], agreeing_weight: float) -> list[Tensor]:
    """For each episode of the steps, in their order, float32 [steps, 2, rungs - 1]: the effects of all rungs but the cheapest,
    cheapest first, and their weights, 0 where nothing is known.

    Args:
        steps: as `steps_of` gives them.
        swapped: as `read_swapped` gives it.
        route: the rungs, dearest first.
        agreeing_weight: of a step at which all rungs act alike.
    """
    # Of each cheaper rung what is lost by it against the dearest; null where that is not known.
    lost = pl.col("high_success").cast(pl.Float64) - pl.col("low_success").cast(pl.Float64)
    wide = swapped.with_columns(lost=pl.when("greedy_agree").then(0.0).otherwise(lost)).pivot(
        "precision", index=["episode_id", "turn", "propensity"], values="lost"
    )
    alike = swapped.group_by("episode_id", "turn").agg(alike=pl.col("greedy_agree").all())
    found = (
        steps.select("episode_id", "turn")
        .join(wide, on=["episode_id", "turn"], how="left", maintain_order="left", validate="1:1")
        .join(alike, on=["episode_id", "turn"], how="left", maintain_order="left", validate="1:1")
    )
    *dearer, cheapest = route
    by_cheapest = found[cheapest].to_numpy()
    by_rung = [np.zeros(len(found)), *(found[rung].to_numpy() for rung in dearer[1:])]
    effects = np.stack([by_cheapest - its for its in reversed(by_rung)], axis=1)
    each = (
        found.select(pl.when("alike").then(agreeing_weight).otherwise(1 / pl.col("propensity"))).to_series().to_numpy()
    )
    weights = np.where(np.isnan(effects), 0.0, np.nan_to_num(each)[:, None])
    rows = torch.from_numpy(np.stack([np.nan_to_num(effects), weights], axis=1)).float()
    sizes = steps.group_by("episode_id", maintain_order=True).len()["len"].to_list()
    return list(rows.split(sizes))
