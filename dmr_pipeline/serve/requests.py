"""What clients ask, as far as it is looked at here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.ingestion.schema import Name
from dmr_pipeline.serve.sessions import Budget

_STOPS, _STOP_LENGTH = 4, 1000
"""At most: each piece of a streamed answer is compared with every beginning of each of them. OpenAI takes as many."""

_NAME = TypeAdapter[str](Name)


def _loggable(text: str) -> str:
    try:
        return _NAME.validate_python(text)
    except ValidationError as error:
        raise ValueError("is to be one line without white space around it") from error


Line = Annotated[str, AfterValidator(_loggable)]
"""As the log takes the names of tasks."""


class Options(BaseModel):
    """What an agent at work may say of its episode: in `metadata` (texts), or with the same names in `dmr` (JSON)."""

    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)

    session_id: str | None = Field(None, max_length=200, pattern=r"^[!-~]([ -~]*[!-~])?$")
    """ASCII: answers name it in a header."""
    task: Line | None = Field(None, min_length=1, description="the instruction sentence")
    task_id: Line | None = Field(None, min_length=1, max_length=500)
    task_type: Line | None = Field(None, min_length=1, max_length=200)
    admissible_commands: list[str] | None = Field(None, description="that do something here")
    high_ratio: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="as `Budget.high_ratio`")
    cost: float | None = Field(None, ge=0, allow_inf_nan=False, description="as `Budget.cost`")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)

    include_usage: bool = False


class ChatRequest(BaseModel):
    """`/v1/chat/completions`, and `/v1/decision`. Other fields go on to an upstream as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True)

    model: str = Field(max_length=300)
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    tools: list[Any] | None = None
    metadata: dict[str, Any] | None = None
    dmr: dict[str, Any] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > _STOPS or any(len(text) > _STOP_LENGTH for text in texts):
            raise ValueError(f"name at most {_STOPS} texts of at most {_STOP_LENGTH:,} characters each")
        return stop

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class Outcome(BaseModel):
    """`/v1/sessions/{id}/outcome`."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    success: bool
    reward: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    observation: str = Field("", description="what the last command has shown")
    task_id: Line | None = Field(None, min_length=1, max_length=500)
    task_type: Line | None = Field(None, min_length=1, max_length=200)

    @model_validator(mode="after")
    def _reward_of_success(self) -> Self:
        if self.reward is not None and self.success != (self.reward >= 1):
            raise ValueError(
                f"success is {self.success}, but the reward is {self.reward}; 1 means success: post the outcome again"
            )
        return self


@dataclass(frozen=True)
class Which:
    """Who is to decide, by a model's name: `dmr/RECIPE`, `dmr/RECIPE@3` or `dmr/RECIPE:int4`."""

    release: int | None = None
    """None: the one in use."""
    rung: str | None = None
    """That acts throughout."""


def which_of(model: str, recipe: str) -> Which | None:
    """None where it is no name of this recipe's."""
    kind: Literal["@", ":"]
    own = f"dmr/{recipe}"
    if model == own:
        return Which()
    for kind in ("@", ":"):
        said = model.removeprefix(own + kind)
        if said == model or not said:
            continue
        if kind == ":":
            return Which(rung=said)
        if said.isascii() and said.isdigit() and len(said) < 10:
            return Which(release=int(said))
    return None


def options_of(request: ChatRequest, headers: Mapping[str, str]) -> Options:
    """From `metadata`, `dmr` and headers; of one that is there twice the latter counts.

    Raises:
        UserError: one of them is not as it should be.
    """
    said = {**(request.metadata or {}), **(request.dmr or {})}
    for header, field in (("x-session-id", "session_id"), ("x-dmr-high-ratio", "high_ratio"), ("x-dmr-cost", "cost")):
        if header in headers:
            said[field] = headers[header]
    try:
        return Options.model_validate(said)
    except ValidationError as error:
        raise UserError("; ".join(problems_of(error))) from error


def budget_of(options: Options) -> Budget:
    return Budget(options.high_ratio, options.cost)
