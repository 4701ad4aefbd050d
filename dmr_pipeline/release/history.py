"""The router in use, and the history of every decision about it.

Retraining must not make the agent worse. A newly trained router (the candidate) and the released one play the same
validation games, other ones at each decision and each at its own threshold, and the candidate takes over only if it passes a
non-inferiority test: the lower end of the paired interval of its success minus the released one's is above a margin, on at
least as many games as can show that, and it costs no more than the recipe allows. The rule is ours. People can overrule it in
both directions, by `promote` and `roll_back`.

The history only grows. It is one with the artifact: whoever restores an older artifact restores its history.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dmr_pipeline.artifacts.manifest import MANIFEST, Manifest, folder_hash, hash_files
from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.recipe.release import Release
from dmr_pipeline.release.comparison import (
    Comparison,
    _cost_limit,
    has_enough_games,
    keeps_cost,
    keeps_success,
    needed_by,
)

log = logging.getLogger(__name__)

RELEASES_FILE = "releases.json"

FolderHash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.dir$")]
Verdict = Literal["first", "promoted", "rejected", "not_comparable", "promoted_by_hand", "rolled_back"]


class Decision(FrozenModel):
    """One entry of the history. It was taken about the router in use at the time: the last one released before it."""

    number: int
    router: FolderHash
    """Hash of the artifact `grpo_router` that was decided on."""
    ladder: FolderHash
    """Hash of the artifact `quantized_checkpoints` that this router was trained for."""
    decision: Verdict
    reason: str
    comparison: Comparison | None = None

    @property
    def releases(self) -> bool:
        """Whether its router came into use by it."""
        return self.decision not in ("rejected", "not_comparable")


History = tuple[Decision, ...]
"""All decisions, from number 1 on. Empty, or the first one releases a router."""


class Releases(FrozenModel):
    """`releases.json`."""

    current: int
    """Number of the decision that brought the router in use."""
    decisions: History = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if [decision.number for decision in self.decisions] != list(range(1, len(self.decisions) + 1)):
            raise ValueError("decisions are not numbered 1, 2, 3 and so on")
        if not self.decisions[0].releases:
            raise ValueError("the first decision releases no router")
        for decision in self.decisions:
            if (decision.comparison is not None) != (decision.decision in ("promoted", "rejected")):
                raise ValueError(f"decision {decision.number}: a comparison belongs to 'promoted' and 'rejected' alone")
        if self.current != in_use(self.decisions).number:
            raise ValueError("current is not the last decision that releases a router")
        return self


@dataclass(frozen=True)
class Candidate:
    """The artifact of the stage `grpo_router`."""

    router: str
    """Its hash."""
    ladder: str
    """Hash of the `quantized_checkpoints` that it was trained for."""

    @classmethod
    def of(cls, folder: Path) -> "Candidate":
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        return cls(folder_hash(hash_files(folder)), manifest.inputs["quantized_checkpoints"])


def decide(history: History, candidate: Candidate, rule: Release, compare: Callable[[], Comparison]) -> Decision | None:
    """The automatic decision about a candidate, after a first release; None where there is nothing to decide.

    That is so where the candidate is in use; where it was turned down in favour of the router in use, under the same rule;
    and where somebody has rolled it back: then it returns by hand only.

    Args:
        history: not empty.
        compare: the candidate with the router in use; called only where the decision depends on it.
    """
    current = in_use(history)
    if (
        candidate.router == current.router
        or _is_turned_down(history, candidate.router, rule)
        or _is_rolled_back(history, candidate.router)
    ):
        return None
    if candidate.ladder != current.ladder:
        reason = f"release {current.number} is for another precision ladder; `dmr router promote` releases this router"
        return next_decision(history, candidate, "not_comparable", reason)
    comparison = compare()
    passed = has_enough_games(comparison, rule) and keeps_success(comparison, rule) and keeps_cost(comparison, rule)
    reason = _explain(comparison, rule)
    return next_decision(history, candidate, "promoted" if passed else "rejected", reason, comparison)


def _explain(comparison: Comparison, rule: Release) -> str:
    success = f"success {100 * comparison.interval[0]:+.1f} points at worst"
    cost = f"cost {comparison.candidate.cost:.3f} after {comparison.released.cost:.3f}"
    if not keeps_success(comparison, rule):
        success += f" (asked: above {-100 * rule.success_margin:.1f})"
    if not keeps_cost(comparison, rule):
        cost += f" (asked: at most {_cost_limit(comparison, rule):.3f})"
    if not has_enough_games(comparison, rule):
        few = f"{comparison.games} games cannot show a loss below {100 * rule.success_margin:.1f} points"
        cost += f"; {few}, {needed_by(rule)} are needed (release.games, benchmark.splits.validation)"
    return f"{success}, {cost}"


def in_use(history: Sequence[Decision]) -> Decision:
    """The decision that brought the router in use."""
    return [decision for decision in history if decision.releases][-1]


def earlier_release(history: History, to: int | None = None) -> Decision:
    """The decision to go back to: the given one, or the release before the one in use.

    Raises:
        UserError: there is no such earlier release, or its router is in use already.
    """
    releases = {decision.number: decision for decision in history if decision.releases}
    if len(releases) < 2:
        raise UserError("there is no earlier release to go back to: see `dmr router history`")
    number = list(releases)[-2] if to is None else to
    if number not in releases:
        known = ", ".join(map(str, releases))
        raise UserError(f"decision {number} released no router, so there is nothing to go back to (releases: {known})")
    if releases[number].router == in_use(history).router:
        raise UserError(f"the router of release {number} is in use already: see `dmr router history`")
    return releases[number]


def read_releases(folder: Path) -> Releases:
    """From the folder of the artifact `released_router`.

    Raises:
        UserError: the file is missing or malformed.
    """
    path = folder / RELEASES_FILE
    remedy = f"restore it with `dvc checkout {folder}`"
    try:
        return Releases.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {remedy}") from error
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(problems_of(error))}; {remedy}") from error


def next_decision(
    history: History, candidate: Candidate, verdict: Verdict, reason: str, comparison: Comparison | None = None
) -> Decision:
    """The one that comes next."""
    return Decision(
        number=len(history) + 1,
        router=candidate.router,
        ladder=candidate.ladder,
        decision=verdict,
        reason=reason,
        comparison=comparison,
    )


def _is_turned_down(history: History, router: str, rule: Release) -> bool:
    """Whether it was not released, in favour of the router in use and under the same rule."""
    current = in_use(history).router
    return any(
        decision.router == router
        and not decision.releases
        and in_use(history[:earlier]).router == current
        and (decision.comparison is None or decision.comparison.rule == rule.model_dump(mode="json"))
        for earlier, decision in enumerate(history)
    )


def _is_rolled_back(history: History, router: str) -> bool:
    """Whether it was in use until somebody rolled it back."""
    releases = [decision for decision in history if decision.releases]
    ends = [after.decision for before, after in pairwise(releases) if before.router == router]
    return bool(ends) and ends[-1] == "rolled_back"
