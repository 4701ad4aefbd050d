"""An episode that an agent logged at work, and what is wrong with a row that is none."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.ingestion.rows import json_value

EXAMPLE: dict[str, JsonValue] = {
    "episode_id": "kitchen-robot-2026-11-24-0001",
    "task_id": "kitchen/17",
    "task_type": "pick_and_place_simple",
    "task": "put some apple on sidetable.",
    "observation": "You are in the middle of a room. Looking quickly around you, you see a fridge 1, and a sidetable 1.",
    "steps": [
        {
            "command": "go to fridge 1",
            "thought": "find apple",
            "observation": "You arrive at fridge 1. The fridge 1 is closed.",
            "precision": "float",
        },
        {
            "command": "open fridge 1",
            "observation": "You open the fridge 1. In it, you see nothing.",
            "precision": "int2",
        },
    ],
    "success": False,
}


Name = Annotated[str, Field(min_length=1, pattern=r"^\S(.*\S)?$")]
"""One line without white space around it."""


def _left_out_as_empty(text: object) -> object:
    return "" if text is None else text


class LoggedStep(FrozenModel):
    """One step of a logged episode. Texts are kept as they are, of whatever length: an episode whose transcript the agent has no
    room for is not trained on, and the stages that leave it out say so."""

    model_config = ConfigDict(strict=True)

    command: str = Field(
        description="what the agent did, as the environment was given it: empty where the agent wrote nothing, of several lines"
        " where it wrote several"
    )
    thought: Annotated[str, BeforeValidator(_left_out_as_empty, json_schema_input_type=str | None)] = Field(
        "",
        description="what the agent thought before the command, if it is one that thinks; null is the same as left out",
    )
    observation: str = Field(description="what the command showed")
    precision: Name = Field(description="rung of the recipe's precision ladder that acted, such as float or int2")
    probability: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="with which the policy at work chose the ladder's high rung at this step, whatever it then drew; left out"
        " where it is not known",
    )
    propensity: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="with which what acted was chosen, all that was drawn at random included: 1 where nothing was; left out where"
        " it is not known",
    )
    reason: Name | None = Field(
        None,
        description="why this rung acted: router, rule, fixed, forced, budget, fallback or exploration; left out where it is not"
        " known",
    )
    release: int | None = Field(
        None, ge=1, le=10**9, description="number of the release whose router decided, if one did"
    )


class LoggedEpisode(FrozenModel):
    """One logged episode: a line of NAME.jsonl (UTF-8; no key twice in an object), or a row of NAME.parquet, whose `steps` are a
    list of structs. A null in Parquet is a field that was left out. A file holds at most 64 MiB, also once it is unpacked."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [EXAMPLE]})

    episode_id: Name = Field(description="unique over all files that were ever ingested for the recipe")
    task_id: Name = Field(
        description="the game or goal, named as the benchmark names it or by its file's path, URL or session; none of a held-out"
        " split. One that the recipe has not drawn is taken in, with a warning"
    )
    task_type: Name = Field(
        description="the benchmark's kind of task: in ALFWorld such as pick_and_place_simple, in WebShop the category"
    )
    task: Name = Field(description="the instruction sentence")
    observation: str = Field(pattern=r"\S", description="the first observation, without the instruction")
    steps: list[LoggedStep] = Field(min_length=1, description="in order; at most benchmark.step_limit of the recipe")
    success: bool = Field(description="whether the task was solved")
    reward: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="1 where the task was solved, else less; success by default"
    )

    @model_validator(mode="after")
    def _reward_of_success(self) -> Self:
        if self.reward is not None and self.success != (self.reward >= 1):
            raise ValueError(f"success is {self.success}, but the reward is {self.reward}; 1 means success")
        return self


class NoEpisode(Exception):
    """What is wrong with a row, a line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def parse_episode(row: Any) -> LoggedEpisode:  # noqa: ANN401 - a line of JSON, or what a row of Parquet holds
    """The episode that a row holds.

    Raises:
        NoEpisode: which one, and all that is wrong with it.
    """
    try:
        value = json_value(row) if isinstance(row, bytes) else row
    except UserError as error:
        raise NoEpisode([str(error)]) from error
    try:
        return LoggedEpisode.model_validate(value)
    except ValidationError as error:
        named = f"episode {value['episode_id']!r}: " if isinstance(value, dict) and value.get("episode_id") else ""
        raise NoEpisode([f"{named}{problem}" for problem in problems_of(error)]) from error
