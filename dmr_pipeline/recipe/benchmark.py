"""Section `benchmark`: which games are played."""

from typing import Any

from pydantic import Field
from pydantic_core import PydanticCustomError

from dmr_pipeline import benchmarks
from dmr_pipeline.recipe.fields import GameCount, Section, Seed, StepLimit

DEFAULT_BENCHMARK = "alfworld"


class Splits(Section):
    """Numbers of games in the four disjoint splits."""

    agent_train: GameCount = Field(description="games; the agent learns on these")
    router_train: GameCount = Field(
        description="games; labels and GRPO (an agent's confidence on its own training games is memorised)"
    )
    validation: GameCount = Field(description="games; every choice: threshold, rung, checkpoint, headline policy")
    test: GameCount = Field(description="games; touched once, by the evaluation report")


class Games(Section):
    """Which games are played, whatever the environment."""

    splits: Splits
    seed: Seed = Field(0, description="decides which games there are, or which of them each split gets")
    step_limit: StepLimit = Field(description="steps an episode may take")
    environment: str = Field(description="the benchmark, and who made its games: generated here, or the official ones")


def games_of_a_benchmark(content: Any) -> Section:  # noqa: ANN401 - what a recipe file holds
    """The section of the benchmark that is named; of generated ALFWorld games where none is."""
    if isinstance(content, Section):
        return content
    name = str(content.get("environment", DEFAULT_BENCHMARK)) if isinstance(content, dict) else DEFAULT_BENCHMARK
    try:
        benchmark = benchmarks.find(name)
    except KeyError as error:
        known = ", ".join(map(repr, benchmarks.names()))
        raise PydanticCustomError("unknown_benchmark", "one of {known}", {"known": known, "name": name}) from error
    section: Section = benchmark.section.model_validate(content)
    return section
