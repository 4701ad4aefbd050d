"""What the sections of recipes are made of: kinds of numbers and texts, each with its bounds, and what a section is."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Self, TypeVar, get_origin

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dmr_pipeline.frozen_model import FrozenModel

Number = TypeVar("Number", int, float)


def at_most(limit: float, reason: str) -> AfterValidator:
    """An upper bound that says why it is there."""

    def check(value: Number) -> Number:
        if value > limit:
            raise PydanticCustomError("at_most", f"Input should be at most {limit:,}: {reason}")
        return value

    return AfterValidator(check)


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(gt=0), at_most(10**9, "more would take years")]
Update = Annotated[int, Field(ge=0), at_most(10**9, "more would take years")]
GameCount = Annotated[int, Field(gt=0), at_most(10**7, "each split draws its games from a range of so many seeds")]
StepLimit = Annotated[int, Field(ge=3), at_most(10_000, "no transcript has room for so many steps")]
"""No task of ALFWorld or WebShop can be done in fewer than three steps."""
MOST_SEED = 2**32 - 1
Seed = Annotated[int, Field(ge=0), at_most(MOST_SEED, "numpy takes no larger seed")]
Rate = Annotated[float, Field(ge=1e-9), at_most(1.0, "no optimiser here learns with larger steps")]
Ratio = Annotated[float, Field(ge=0.001, le=0.999)]
"""Of high precision, for a router: always-high and always-low need none, and are in every report."""
Confidence = Annotated[float, Field(ge=0.5, le=0.999999)]
"""Of an interval: at 1 it would be everything."""
Bootstrap = Annotated[int, Field(gt=0), at_most(1_000_000, "resamples times games are held in memory")]
Batch = Annotated[int, Field(gt=0), at_most(100_000, "they are held in memory at once")]
Size = Annotated[int, Field(gt=0), at_most(1_000_000, "no LLM has so many")]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]
EndText = Annotated[str, Field(min_length=1, max_length=200)]
"""Of an action or a thought."""
Workers = Annotated[int, Field(gt=0), at_most(1024, "no machine has more cores")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100)]
"""Names become parts of file names and of the report's policies."""


def unset(value: object) -> bool:
    """Of a field that came after artifacts had been published: where it is not used it stays out of their provenance."""
    return not value


def too_few_resamples(confidence: float, bootstrap: int) -> Iterator[tuple[str, str]]:
    """What is wrong where the resamples are too few for the interval: `Section.problems` of sections that have both."""
    needed = math.ceil(round(2 / (1 - confidence), 6))
    if bootstrap < needed:
        yield (
            "bootstrap",
            f"{bootstrap} resamples, but an interval of {confidence} has one beyond its ends from {needed} on",
        )


class Section(FrozenModel):
    """A part of a recipe: immutable, and strict about its keys and types."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, content: Any) -> Any:  # noqa: ANN401 - what a recipe file holds
        """YAML knows lists, sections hold tuples, unless a benchmark of one's own says otherwise."""
        if not isinstance(content, dict):
            return content
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        return {
            key: tuple(value) if isinstance(value, list) and key not in lists else value
            for key, value in content.items()
        }

    @model_validator(mode="after")
    def _without_problems(self) -> Self:
        problems = list(self.problems())
        if problems:
            text = "; ".join(f"{field}: {problem}" if field else problem for field, problem in problems)
            raise PydanticCustomError("problems", "{text}", {"text": text, "problems": problems})
        return self

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is wrong although each field by itself is right: field ('' for the whole section), and what to do."""
        yield from ()
