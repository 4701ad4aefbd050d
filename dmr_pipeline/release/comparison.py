"""A newly trained router (the candidate) against the released one, on the same games: is it no worse, and no dearer?"""

import numpy as np
import polars as pl
from pydantic import JsonValue

from dmr_pipeline.evaluation.metrics import compare_policies
from dmr_pipeline.evaluation.statistics import games_needed
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.recipe.release import Release

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
    """Of the difference, at the rule's confidence: `intervals.paired_interval`."""
    wins: int
    """Games that the candidate alone solves."""
    losses: int
    rule: dict[str, JsonValue]
    """The recipe's section `release`, defaults filled in."""


def games_of(number: int, there: int, rule: Release) -> list[int]:
    """Positions of the validation games on which a decision is taken: the next ones at each decision, in one shuffled order,
    round and round. Who is retrained again and again would else be chosen for luck on the same games.

    Args:
        number: of the decision.
        there: validation games.
    """
    count = min(there, rule.games or max(there // 2, needed_by(rule)))
    order = np.random.default_rng(rule.seed).permutation(there)
    return [int(order[(number * count + i) % there]) for i in range(count)]


def needed_by(rule: Release) -> int:
    """Games without which not even a candidate that loses none can be shown to keep the margin."""
    return games_needed(rule.success_margin, rule.confidence)


def has_enough_games(comparison: Comparison, rule: Release) -> bool:
    return comparison.games >= needed_by(rule)


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
    paired = compare_policies(episodes, CANDIDATE, RELEASED, rule.confidence)
    return Comparison(
        games=episodes["task_id"].n_unique(),
        candidate=_figures(episodes, CANDIDATE),
        released=_figures(episodes, RELEASED),
        difference=paired.difference,
        interval=(paired.low, paired.high),
        wins=paired.wins,
        losses=paired.losses,
        rule=rule.model_dump(mode="json"),
    )


def _figures(episodes: pl.DataFrame, policy: str) -> Figures:
    means = episodes.filter(pl.col("policy") == policy).select(
        pl.mean("success"), pl.mean("cost"), high_ratio=pl.sum("high_steps") / pl.sum("steps")
    )
    return Figures(**{name: round(value, 6) for name, value in means.row(0, named=True).items()})
