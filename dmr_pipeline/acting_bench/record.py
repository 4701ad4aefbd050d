"""What the bench writes down."""

from pydantic import BaseModel, ConfigDict

from dmr_pipeline.artifacts.run_record import GitState, Machine


class Row(BaseModel):
    """One way to act, with so many episodes at once after a history."""

    model_config = ConfigDict(extra="forbid")

    way: str
    cache: str = ""
    """`separate` or `shared`, where two precisions act."""
    at_once: int
    history: int
    """Tokens of the transcript before the steps that are timed, and before the one that reads it."""
    problem: str | None = None
    """Why it could not be measured."""
    steps: int = 0
    """That were timed, each with all episodes."""
    ms_a_step: float = 0.0
    """Median, for all episodes together; of CPU time on a CPU, where other processes may be busy, and of the wall's on a GPU."""
    segment: float = 0.0
    """Tokens that a step reads before it acts."""
    action: float = 0.0
    """Tokens that it writes."""
    passes_of_dear: float = 0.0
    """Forward passes a step, each of all episodes that it is for; of the only precision where one acts."""
    passes_of_cheap: float = 0.0
    drafted: int = 0
    accepted: int = 0
    compared: int = 0
    """Actions, with those of the dear precision alone."""
    equal: int = 0
    bytes_a_step: float = 0.0
    """Weights that its passes read, once for all episodes, and keys and values of each."""
    limit_ms: float = 0.0
    """These bytes over the memory's bandwidth."""
    weight_bytes: int = 0
    """Of the models, in memory."""
    cache_bytes: int = 0
    """Of keys and values at the end, in memory."""


class ActingRecord(BaseModel):
    """All measurements of a run."""

    model_config = ConfigDict(extra="forbid")

    date: str
    """UTC."""
    git: GitState | None
    machine: Machine
    versions: dict[str, str]
    model: str
    device: str
    bandwidth: float
    """Bytes a second that the sum of a large tensor reads."""
    rows: list[Row] = []

    @property
    def passed(self) -> bool:
        """Whether something was measured, and nothing failed."""
        return bool(self.rows) and all(row.problem is None or row.problem.startswith("left out") for row in self.rows)
