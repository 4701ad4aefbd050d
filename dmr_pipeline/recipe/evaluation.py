"""Section `evaluation`: what the report compares."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from dmr_pipeline.recipe.fields import (
    Bootstrap,
    Confidence,
    Count,
    Ratio,
    Section,
    Seed,
    at_most,
    too_few_resamples,
    unset,
)

RuleName = Literal[
    "random",
    "evenly",
    "first",
    "last",
    "stuck",
    "stuck_capped",
    "episode",
    "episode_margin",
    "margin",
    "margin_capped",
    "entropy",
    "entropy_capped",
    "inadmissible",
]
"""Rules that nobody trained (router/rules.py)."""
OracleName = Literal["disagreement", "divergence"]
"""Oracles that a bar decides for (router/oracles.py)."""


class Evaluation(Section):
    random_draws: Annotated[int, Field(gt=0), at_most(10_000, "each plays all test games")] = Field(
        3, description="draws of random routing at each router's ratio"
    )
    confidence_ratio: Ratio = Field(
        0.3,
        description="high-precision ratio at most, to which the confidence cascade is calibrated on validation games",
    )
    confidence_games: Count = Field(60, description="validation games for that")
    budgets: tuple[Ratio, ...] = Field(
        (),
        exclude_if=unset,
        max_length=50,
        description="high-precision ratios, rising: each router and each rule is set to each of them, at most, on validation"
        " games, and plays the test games there, for the report's curves; without them there are no curves",
    )
    budget_games: Count | None = Field(
        None, exclude_if=unset, description="validation games for that, the first ones; all of them by default"
    )
    rules: tuple[RuleName, ...] = Field(
        (),
        exclude_if=unset,
        max_length=50,
        description="rules that get a curve (router/rules.py); all of them by default",
    )
    confidence: Confidence = Field(0.95, description="of the intervals")
    bootstrap: Bootstrap = Field(2000, description="bootstrap resamples, of games")
    seed: Seed = Field(0, description="of random routing, of the resamples, and of actions drawn at a temperature")

    def problems(self) -> Iterator[tuple[str, str]]:
        if any(before >= after for before, after in pairwise(self.budgets)):
            yield "budgets", f"{list(self.budgets)} do not rise"
        for field in ("budget_games", "rules"):
            if getattr(self, field) and not self.budgets:
                yield field, "is for curves: name 'budgets', or leave this out"
        if len(set(self.rules)) != len(self.rules):
            yield "rules", f"{list(self.rules)} are not all different"
        yield from too_few_resamples(self.confidence, self.bootstrap)
