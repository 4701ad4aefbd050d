"""What stages tell of their artifacts and other modules read. Every other fact of a summary is for people."""

from pydantic import BaseModel, ConfigDict


class _Summary(BaseModel):
    """Fields are the facts that are read elsewhere; more may be told."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)


class AgentSummary(_Summary):
    validation_success: float | None = None
    """Share of the validation games that it wins; None of an agent that was brought along, which has played none yet."""


class IngestedSummary(_Summary):
    """Without the episodes that are left out."""

    files: int
    episodes: int
    steps: int


class SensitivitySummary(_Summary):
    ingested_steps: int
    """Steps of ingested episodes that are labelled."""


class KlSummary(_Summary):
    validation_spend: float
    """On validation games, at the calibrated threshold; of two rungs the high-precision ratio."""


class GrpoSummary(_Summary):
    validation_ratio: float
    """Spend on validation games at the chosen update; of two rungs the high-precision ratio."""
    calibrated_validation_ratio: float | None = None
    """The same at the calibrated threshold; None where the recipe asks for no ratio."""
