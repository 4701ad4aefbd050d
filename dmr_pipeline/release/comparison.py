"""A newly trained router (the candidate) against the released one, on the same games: is it no worse, and no dearer?"""

import polars as pl
from pydantic import JsonValue

from dmr_pipeline.evaluation.metrics import compare_policies
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.recipe import Release

CANDIDATE, RELEASED = "candidate", "released"


class Figures(FrozenModel):
    """One router on the games of a comparison: means over the games."""

    success: float
    cost: float
    """In mean always-high validation episodes."""
    high_ratio: float
    """High-precision steps / steps, over all episodes together."""


class Comparison(FrozenModel):
    """A candidate and the router that was in use, on the same games. Six decimals: the rule is applied to these numbers."""

    games: int
    candidate: Figures
    released: Figures
    difference: float
    """Success of the candidate minus success of the released router."""
    interval: tuple[float, float]
    """Of the difference, at the rule's confidence: percentile bootstrap over games."""
    wins: int
    """Games that the candidate alone solves."""
    losses: int
    rule: dict[str, JsonValue]
    """The recipe's section `release`, defaults filled in."""


def keeps_success(comparison: Comparison, rule: Release) -> bool:
    return comparison.interval[0] > -rule.success_margin


def keeps_cost(comparison: Comparison, rule: Release) -> bool:
    return comparison.candidate.cost <= _cost_limit(comparison, rule)


def _cost_limit(comparison: Comparison, rule: Release) -> float:
    """Rounded as the costs are, so that float noise does not part equals."""
    return round(comparison.released.cost * (1 + rule.cost_increase), 6)


def compare_routers(episodes: pl.DataFrame, rule: Release) -> Comparison:
    """
    Args:
        episodes: rows as `metrics.EPISODES` says, of the policies CANDIDATE and RELEASED: one episode of each game each.
    """
    paired = compare_policies(
        episodes, CANDIDATE, RELEASED, confidence=rule.confidence, bootstrap=rule.bootstrap, seed=rule.seed
    )
    low, high = paired["ci95"]
    return Comparison(
        games=episodes["task_id"].n_unique(),
        candidate=_figures(episodes, CANDIDATE),
        released=_figures(episodes, RELEASED),
        difference=paired["difference"],
        interval=(low, high),
        wins=paired["wins"],
        losses=paired["losses"],
        rule=rule.model_dump(mode="json"),
    )


def _figures(episodes: pl.DataFrame, policy: str) -> Figures:
    means = episodes.filter(pl.col("policy") == policy).select(
        pl.mean("success"), pl.mean("cost"), high_ratio=pl.sum("high_steps") / pl.sum("steps")
    )
    return Figures(**{name: round(value, 6) for name, value in means.row(0, named=True).items()})
