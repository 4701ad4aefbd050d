"""Section `sensitivity`: at which steps precision matters."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dmr_pipeline.recipe.fields import Count, Ratio, Section, Seed, Share, at_most, unset


class Consequences(Section):
    """Labels by consequence, ours: at steps where the precisions' greedy actions differ, both are played on to the end."""

    continuation: Literal["low", "high", "mixed"] = Field(
        "low",
        description="who goes on: the cheapest routed rung, the dearest, or all, each step drawn by equal chances",
    )
    games: Count | None = Field(None, description="of router_train, the first ones; all by default")
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="of the steps where actions differ, drawn at random; each counts for as many as it stands for"
    )
    seed: Seed = Field(0, description="of these draws, and of a mixed continuation")


class Sensitivity(Section):
    """Labels. The paper's label is KL >= tau; direction, tokens, teacher forcing and tau are ours to choose."""

    direction: Literal["high_low", "low_high", "js"] = Field(
        "high_low", description="KL(high||low), KL(low||high), or Jensen-Shannon"
    )
    tokens: Literal["action", "command"] = Field(
        "action",
        exclude_if=lambda tokens: tokens == "action",
        description="ours: what a divergence is summed over, all of the action or only what follows its thought. A long"
        " thought's sum measures its length more than the step's risk: command is for LLMs that think at length",
    )
    tau: Annotated[float, Field(gt=0), at_most(1000.0, "no step's divergence is larger")] | None = Field(
        None, description="absolute threshold in nats"
    )
    quantile: Ratio | None = Field(
        None,
        description="threshold as a quantile of the KL over all steps, each with every cheaper routed rung; at 0 or 1 there"
        " would be a single class",
    )
    won_only: bool = Field(
        False,
        description="ours: only steps of episodes that were won can be sensitive. In a lost episode the precisions diverge"
        " the most, but high precision no longer helps there",
    )
    consequences: Consequences | None = Field(
        None,
        exclude_if=unset,
        description="swap the precision of single steps of the trajectories and play on, for `kl_router.target: consequence`;"
        " it takes much longer than the divergences",
    )
    label_share: tuple[Share, Share] = Field(
        (0.02, 0.6), description="bounds for the share of sensitive steps; outside them the check fails"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.tau is None) == (self.quantile is None):
            yield "", "give exactly one of 'tau' and 'quantile'"
        if not self.label_share[0] < self.label_share[1]:
            yield "label_share", f"{list(self.label_share)}: the first is the lower bound, the second the upper one"
