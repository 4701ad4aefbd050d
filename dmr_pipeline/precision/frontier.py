"""What each rung of the precision ladder loses, measured, and whether there is anything for a router to do."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.recipe import Precisions

LADDER_FILE = "ladder.json"


class RungFacts(FrozenModel):
    """One rung, measured."""

    name: str
    bytes: int
    """Of all weights, as stored."""
    bits_per_weight: float
    """Over all weights, the float ones among them."""
    quantized_share: float
    """Weights that are quantized, of all weights."""
    kl_to_float: float
    """KL(float || rung) over a whole action, teacher-forced on the expert's, mean over steps; nats."""
    greedy_disagreement: float
    """Share of action tokens whose greedy choice is not the float model's."""
    validation_success: float
    validation_steps: float
    reloads_equal: bool
    """Whether the saved weights, loaded again, give the logits of the model that was saved, bit by bit."""


class Gate(FrozenModel):
    """Whether there is anything for a router to do: measured in closed loop, before any router is trained."""

    high: float
    low: float
    gap: float
    passed: bool
    verdict: str


class LadderFacts(BaseModel):
    """The stage's summary, and its file."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    rungs: list[RungFacts]
    gate: Gate
    always_high_cost: float
    """Mean bytes read in an always-high episode on validation games: the unit of cost."""


def gate(facts: Sequence[RungFacts], precisions: Precisions) -> Gate:
    """Dearest routed rung strong enough, the cheapest far enough below it and not too far."""
    success = {rung.name: rung.validation_success for rung in facts}
    dearest, cheapest = precisions.route[0], precisions.route[-1]
    high, low = success[dearest], success[cheapest]
    smallest, largest = precisions.gate_gap
    gap = round(high - low, 6)
    passed = high >= precisions.gate_high and smallest <= gap <= largest
    verdict = (
        f"{dearest} wins {high:.1%} of the validation games (asked: at least {precisions.gate_high:.0%}), "
        f"{cheapest} {100 * gap:.1f} points fewer (asked: {100 * smallest:.0f} to {100 * largest:.0f})"
    )
    return Gate(high=high, low=low, gap=gap, passed=passed, verdict=verdict)


def read_ladder(checkpoints: Path) -> LadderFacts:
    """What `quantized_checkpoints` measured.

    Raises:
        UserError: another version of the stage has written it.
    """
    path = checkpoints / LADDER_FILE
    try:
        return LadderFacts.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"{path} is of another version of this stage: make quantized_checkpoints again") from error
