"""Section `release`: when a new router takes the place of the released one."""

from typing import Annotated

from pydantic import Field

from dmr_pipeline.recipe.fields import Confidence, Count, Section, Seed, Share, at_most


class Release(Section):
    """When a newly trained router takes the place of the released one. The rule and its numbers are ours."""

    success_margin: Share = Field(
        0.05,
        description="promoted only if the lower bound of the paired difference in success, new minus released, is above"
        " minus this",
    )
    cost_increase: Annotated[float, Field(ge=0.0), at_most(1000.0, "any router would do")] = Field(
        0.0, description="mean cost of an episode may rise by this share of the released router's at most"
    )
    games: Count | None = Field(
        None,
        description="validation games that both play, the next ones at each decision; by default half of them, or as many as the"
        " margin needs; with fewer than it needs nothing is promoted",
    )
    confidence: Confidence = Field(0.95, description="of the interval whose lower bound decides")
    seed: Seed = Field(0, description="of the games' order, and of actions drawn at a temperature")
