"""What the stage `quantized_checkpoints` tells of its rungs. Nothing heavy is imported here: commands that look read it."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel

LADDER_FILE = "ladder.json"


class RungFacts(FrozenModel):
    """One rung, measured."""

    name: str
    bytes: int
    """Of all weights, as stored, with 16 bits a float."""
    pass_bytes: int
    """Of the weights that every forward pass reads: all but the embeddings."""
    bits_per_weight: float
    """Over all weights, the float ones among them."""
    quantized_share: float
    """Weights that are quantized, of all weights."""
    kl_to_float: float
    """KL(float || rung) over a whole action, teacher-forced on the expert's, mean over steps; nats."""
    greedy_disagreement: float
    """Share of action tokens whose greedy choice is not the float model's."""
    reloads_equal: bool
    """Whether the saved weights, loaded again, give the logits of the model that was saved, bit by bit."""


class RungPlayed(RungFacts):
    """And how it plays the validation games, alone."""

    validation_success: float
    success_low: float
    success_high: float
    """Ends of its interval, Wilson's."""
    validation_steps: float
    parse_failures: float
    """Share of its steps whose action was none as the prompt wants it."""
    cost: float
    """Mean of an episode, in the unit of `LadderFacts.unit_bytes`."""
    cost_cache: float
    """The part of it that is keys and values."""
    lost: float
    """Success of the ladder's dearest rung minus its own, on the same games."""
    lost_low: float
    lost_high: float
    """Ends of its interval (`frontier.paired_interval`)."""
    dominated_by: str
    """See `hull.dominators`; empty on the front."""
    games: int | None = Field(None, exclude_if=lambda games: games is None)
    """Validation games that it has played, where it was beaten by then and stopped (`precisions.stop_beaten_after`); what is
    told of it is of these."""


class Checked(FrozenModel):
    """How the rung to deploy plays the same games where it only checks what a cheaper one drafts: its own actions, but for near
    ties, or a draw at a temperature."""

    drafter: str
    validation_success: float
    cost: float
    """Mean of an episode, as `RungPlayed.cost`."""
    cost_cache: float
    passes: float
    """Of the rung that checks, a step."""
    accepted: float
    """Share of the drafted tokens that it took."""


class Verdict(FrozenModel):
    """Whether routing can pay on this ladder."""

    pays: bool
    route: tuple[str, ...]
    """The rungs between which it can, dearest first; the one to deploy where it cannot."""
    deploy: str
    """The rung to act with as long as no router does better."""
    drafter: str
    """The rung whose drafts it had best check; empty where it costs the least to let it write."""
    text: str


def deployed(verdict: Verdict) -> list[str]:
    """The rungs whose weights are needed to act without a router."""
    return [verdict.deploy, *([verdict.drafter] if verdict.drafter else [])]


def nothing_to_lose(rungs: Sequence[RungPlayed], margin: float) -> bool:
    """Whether no rung wins more games than one may lose and still pass for as good, so that the cheapest one always does."""
    return max(rung.validation_success for rung in rungs) <= margin


class LadderFacts(BaseModel):
    """The stage's summary, and its file."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    rungs: list[RungPlayed]
    checked: list[Checked]
    """Of `verdict.deploy`, by each rung that reads less a pass; none where drafts cannot be checked."""
    verdict: Verdict
    route: tuple[str, ...]
    """The rungs that routers choose from, dearest first: as the recipe names them, or as the verdict does (`route: auto`)."""
    unit_bytes: float
    """Bytes read in the mean episode of the ladder's dearest rung on validation games, with 16-bit weights: the unit of cost."""
    games: int
    confidence: float
    """Of the intervals."""


def to_deploy_instead(facts: LadderFacts, margin: float) -> list[str]:
    """As `deployed`, where that is what the verdict advises; none where routing can pay, or no rung knows the task."""
    return [] if facts.verdict.pays or nothing_to_lose(facts.rungs, margin) else deployed(facts.verdict)


def read_ladder(checkpoints: Path) -> LadderFacts:
    """What `quantized_checkpoints` measured.

    Raises:
        UserError: it is not there, or another version of the stage has written it.
    """
    path = checkpoints / LADDER_FILE
    try:
        return LadderFacts.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: `dmr ladder {checkpoints.parent.name}` makes the ladder") from error
    except ValidationError as error:
        raise UserError(f"{path} is of another version of this stage: make quantized_checkpoints again") from error
