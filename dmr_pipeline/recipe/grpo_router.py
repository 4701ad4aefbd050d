"""Section `grpo_router`: stage 2 of the router's training."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dmr_pipeline.recipe.fields import Batch, Count, Rate, Ratio, Section, Seed, Update, at_most, unset


class GrpoBudget(Section):
    """What stage 2 may spend; the price is solved for, by dual ascent: it rises by an update as long as more is spent."""

    ratio: Ratio | None = Field(
        None,
        description="mean spend of all steps, with two rungs the high-precision ratio; then lambda prices that in place of cost",
    )
    cost: Annotated[float, Field(gt=0.0), at_most(100.0, "nothing costs that much")] | None = Field(
        None, description="mean cost of an episode, in the ladder's unit"
    )
    rate: Annotated[float, Field(gt=0.0), at_most(100.0, "the price would jump between its ends")] = Field(
        0.5,
        description="what lambda rises by in an update for each unit that the update's episodes spent above the budget",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.ratio is None) == (self.cost is None):
            yield "", "give either ratio or cost"


class GrpoRouter(Section):
    """Stage 2: GRPO on success and cost."""

    updates: Count = Field(description="times that new episodes are played and learned from")
    games_per_update: Batch = Field(description="games of router_train an update, a group of episodes each")
    group_size: Annotated[int, Field(ge=2), at_most(10_000, "they are played at once")] = Field(
        description="episodes of one game in a group; with one alone there is nothing to compare"
    )
    iterations: Count = Field(1, description="optimizer steps on the same episodes (GRPO's mu)")
    clip: Ratio = Field(0.2, description="GRPO's epsilon: bounds the importance ratio to 1 - clip and 1 + clip")
    learning_rate: Rate = Field(description="of the optimiser")
    reward: Literal["gated", "difference"] = Field(
        "gated",
        description="gated: success * (1 - cost_weight * cost), ours; difference: success - cost_weight * cost, the paper's",
    )
    cost_weight: Annotated[float, Field(ge=0.0), at_most(100.0, "success would count for nothing")] = Field(
        description="lambda; with a budget, where it starts"
    )
    budget: GrpoBudget | None = Field(
        None, exclude_if=unset, description="solve lambda for what may be spent, and keep the best weights within that"
    )
    start: Literal["untrained"] | None = Field(
        None,
        exclude_if=unset,
        description="untrained: new weights in the place of those that stage 1 has learned (an ablation); by default stage 1's",
    )
    branch_groups: Update = Field(
        0,
        exclude_if=unset,
        description="of games_per_update, those whose group branches at one decision (see router/grpo_groups.py)",
    )
    refills: Update = Field(
        0,
        exclude_if=unset,
        description="rounds in which groups whose rewards tie are replaced by other games' in an update",
    )
    entropy_weight: Annotated[float, Field(ge=0.0), at_most(100.0, "nothing else would count")] = Field(
        0.0,
        exclude_if=unset,
        description="added to an episode's reward for each nat of entropy of a decision; keeps the router from collapsing",
    )
    beta: Annotated[float, Field(ge=0.0), at_most(100.0, "the router would stay as it is")] = Field(
        0.0, description="KL penalty to the stage-1 router"
    )
    initial_ratio: Ratio = Field(
        0.4, description="mean routing probability that the tempered stage-1 router starts from"
    )
    validate_every: Count = Field(description="updates between two validations; the best checkpoint is kept")
    validation_games: Count = Field(description="validation games that choose checkpoint and threshold")
    target_ratio: Ratio | None = Field(
        None,
        description="high-precision ratio on validation games at most, to which the threshold is calibrated in closed loop;"
        " without it, the threshold is 0.5",
    )
    seed: Seed = Field(0, description="of the games' order and of the routing decisions")

    def too_small_to_branch(self, rungs: int) -> Iterator[str]:
        """What is wrong with the group size, where so many rungs are routed."""
        if self.branch_groups and self.group_size < rungs:
            yield (
                f"grpo_router.group_size: {self.group_size}, but a group that branches deals each of the {rungs} routed rungs to"
                " a member at least"
            )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.reward == "gated" and self.cost_weight > 1:
            yield (
                "cost_weight",
                f"{self.cost_weight}: with the gated reward, a game won at the cost of always-high would be worth less than"
                " a lost one; give at most 1",
            )
        if self.branch_groups > self.games_per_update:
            yield (
                "branch_groups",
                f"{self.branch_groups}: an update has only {self.games_per_update} groups (games_per_update)",
            )
        if self.budget is not None and self.target_ratio is not None:
            yield (
                "target_ratio",
                "leave it out: with a budget of ratio the threshold is calibrated to that",
            )
