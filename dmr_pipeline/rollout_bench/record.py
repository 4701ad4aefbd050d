"""What the bench writes down, and the committed record of the engine that later ones are compared with."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dmr_pipeline.artifacts.run_record import GitState, Machine

BASELINE_FILE = Path(__file__).with_name("baseline.json")


class Figure(BaseModel):
    """One measurement, in a process of its own with one torch thread."""

    model_config = ConfigDict(extra="forbid")

    agent: str
    way: str
    """`Way`'s value."""
    at_once: int
    """Episodes in a batch."""
    episodes: int
    steps: int
    """Actions of all the episodes, each with the reading before it."""
    tokens: int
    """That the actions have."""
    cpu_seconds: float
    """Of the process, over all the steps; the environment's among them."""
    wall_seconds: float
    memory_bytes: int
    """The most that the process held, above what it held with the model and the games loaded."""
    compared: int
    """Steps of the episodes that `generate`, reading each transcript anew, has acted in too."""
    equal: int
    """Those of them whose action is the same."""

    @property
    def steps_a_second(self) -> float:
        """Of CPU time, which on an idle core is the clock's; on a busy machine a CPU second does less."""
        return self.steps / self.cpu_seconds


class RolloutRecord(BaseModel):
    """All measurements of a run."""

    model_config = ConfigDict(extra="forbid")

    date: str
    """UTC."""
    git: GitState | None
    machine: Machine
    versions: dict[str, str]
    figures: list[Figure] = []

    @property
    def equal(self) -> bool:
        """Whether all compared actions are the same, and every figure has some."""
        return all(0 < figure.compared == figure.equal for figure in self.figures)

    def like(self, other: Figure) -> Figure | None:
        """The measurement of the same episodes, in the same way."""
        return next((figure for figure in self.figures if _what(figure) == _what(other)), None)


def read_baseline() -> RolloutRecord:
    return RolloutRecord.model_validate_json(BASELINE_FILE.read_text(encoding="utf-8"))


def _what(figure: Figure) -> tuple[str, str, int, int]:
    return figure.agent, figure.way, figure.at_once, figure.episodes
