"""Stage `released_router`: the router in use, and the history of every decision about it.

Retraining must not make the agent worse. A newly trained router (the candidate) and the released one play the same
validation games, each at its own threshold, and the candidate takes over only if it passes a non-inferiority test: the
lower end of the paired interval of its success minus the released one's is above a margin, and it costs no more than the
recipe allows. The rule is ours. People can overrule it in both directions, by `promote` and `roll_back`.

The history only grows. It is one with the artefact: whoever restores an older artefact restores its history.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.artifacts.store import MANIFEST, Manifest, folder_hash, hash_files
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.metrics import compare_policies
from dmr_pipeline.recipe import Evaluation, Release

log = logging.getLogger(__name__)

RELEASES_FILE = "releases.json"
CANDIDATE, RELEASED = "candidate", "released"

FolderHash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.dir$")]
Verdict = Literal["first", "promoted", "rejected", "not_comparable", "promoted_by_hand", "rolled_back"]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(Record):
    """One router on the games of a comparison: means over the games."""

    success: float
    cost: float
    """In mean always-high validation episodes."""
    high_ratio: float
    """High-precision steps / steps, over all episodes together."""


class Comparison(Record):
    """A candidate and the router that was in use, on the same games. Six decimals: the rule is applied to these numbers."""

    games: int
    candidate: Figures
    released: Figures
    difference: float
    """Success of the candidate minus success of the released router."""
    interval: tuple[float, float]
    """Of the difference, at the rule's confidence: percentile bootstrap over games."""
    wins: int
    """Games that the candidate alone solves."""
    losses: int
    rule: dict[str, JsonValue]
    """The recipe's section `release`, defaults filled in."""


class Decision(Record):
    """One entry of the history. It was taken about the router in use at the time: the last one released before it."""

    number: int
    router: FolderHash
    """Hash of the artefact `grpo_router` that was decided on."""
    ladder: FolderHash
    """Hash of the artefact `quantized_checkpoints` that this router was trained for."""
    decision: Verdict
    reason: str
    comparison: Comparison | None = None

    @property
    def releases(self) -> bool:
        """Whether its router came into use by it."""
        return self.decision not in ("rejected", "not_comparable")


History = tuple[Decision, ...]
"""All decisions, from number 1 on. Empty, or the first one releases a router."""


class Releases(Record):
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
    """The artefact of the stage `grpo_router`."""

    router: str
    """Its hash."""
    ladder: str
    """Hash of the `quantized_checkpoints` that it was trained for."""

    @classmethod
    def of(cls, folder: Path) -> "Candidate":
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        return cls(folder_hash(hash_files(folder)), manifest.inputs["quantized_checkpoints"])


def released_router(context: StageContext) -> StageResult:
    """Release the candidate if it is the first one, or if it is not worse than the router in use.

    Raises:
        UserError: the history is malformed, or the candidate was trained for other precisions than there are now.
    """
    grpo_router, released, rule = context.inputs["grpo_router"], context.previous, context.recipe.release
    candidate = Candidate.of(grpo_router)
    if released is None:
        return _write(context, (_decision((), candidate, "first", "there was no release before"),), grpo_router)
    history = read_releases(released).decisions
    decision = decide(history, candidate, rule, lambda: compare_routers(play_both(context, released, candidate), rule))
    if decision is None:
        log.info("released_router: router %s is in use, was turned down or rolled back before", candidate.router[:7])
        return _write(context, history, released)
    return _write(context, (*history, decision), grpo_router if decision.releases else released)


def promote(context: StageContext) -> StageResult:
    """Release the candidate without a comparison: somebody decided so.

    Raises:
        UserError: the history is malformed, or the candidate is in use already.
    """
    history, candidate = _read_previous(context), Candidate.of(context.inputs["grpo_router"])
    if history and in_use(history).router == candidate.router:
        raise UserError(
            f"router {candidate.router[:7]} of {context.inputs['grpo_router']} is in use already "
            f"(release {in_use(history).number}): there is nothing to promote"
        )
    decision = _decision(history, candidate, "promoted_by_hand", "by hand")
    return _write(context, (*history, decision), context.inputs["grpo_router"])


def roll_back(context: StageContext, to: int, router: Path) -> StageResult:
    """Release an earlier router again: somebody decided so. It is a decision of its own, so that no history is lost.

    Args:
        to: number of the decision that released it.
        router: folder of the artefact `grpo_router` of that time.

    Raises:
        UserError: the history is malformed, `to` is no earlier release, or the folder holds another router.
    """
    history = _read_previous(context)
    earlier = earlier_release(history, to)
    found = Candidate.of(router)
    if found.router != earlier.router:
        raise UserError(f"{router} holds router {found.router[:7]}, but release {to} is router {earlier.router[:7]}")
    if found.ladder != Candidate.of(context.inputs["grpo_router"]).ladder:
        log.warning("released_router: router %s was trained for another precision ladder", found.router[:7])
    decision = _decision(history, found, "rolled_back", f"by hand, back to release {to}")
    return _write(context, (*history, decision), router)


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
        return _decision(history, candidate, "not_comparable", reason)
    comparison = compare()
    passed = keeps_success(comparison, rule) and keeps_cost(comparison, rule)
    reason = _explain(comparison, rule)
    return _decision(history, candidate, "promoted" if passed else "rejected", reason, comparison)


def keeps_success(comparison: Comparison, rule: Release) -> bool:
    return comparison.interval[0] > -rule.success_margin


def keeps_cost(comparison: Comparison, rule: Release) -> bool:
    return comparison.candidate.cost <= _cost_limit(comparison, rule)


def _cost_limit(comparison: Comparison, rule: Release) -> float:
    """Rounded as the costs are, so that float noise does not part equals."""
    return round(comparison.released.cost * (1 + rule.cost_increase), 6)


def _explain(comparison: Comparison, rule: Release) -> str:
    success = f"success {100 * comparison.interval[0]:+.1f} points at worst"
    cost = f"cost {comparison.candidate.cost:.3f} after {comparison.released.cost:.3f}"
    if not keeps_success(comparison, rule):
        success += f" (asked: above {-100 * rule.success_margin:.1f})"
    if not keeps_cost(comparison, rule):
        cost += f" (asked: at most {_cost_limit(comparison, rule):.3f})"
    return f"{success}, {cost}"


def compare_routers(episodes: pl.DataFrame, rule: Release) -> Comparison:
    """
    Args:
        episodes: rows as `metrics.EPISODES` says, of the policies CANDIDATE and RELEASED: one episode of each game each.
    """
    paired = compare_policies(
        episodes, CANDIDATE, RELEASED, confidence=rule.confidence, bootstrap=rule.bootstrap, seed=rule.seed
    )
    low, high = paired["ci95"]
    return Comparison(
        games=episodes["game_id"].n_unique(),
        candidate=_figures(episodes, CANDIDATE),
        released=_figures(episodes, RELEASED),
        difference=paired["difference"],
        interval=(low, high),
        wins=paired["wins"],
        losses=paired["losses"],
        rule=rule.model_dump(mode="json"),
    )


def _figures(episodes: pl.DataFrame, policy: str) -> Figures:
    means = episodes.filter(pl.col("policy") == policy).select(
        pl.mean("success"), pl.mean("cost"), high_ratio=pl.sum("high_steps") / pl.sum("steps")
    )
    return Figures(**{name: round(value, 6) for name, value in means.row(0, named=True).items()})


def play_both(context: StageContext, released: Path, candidate: Candidate) -> pl.DataFrame:
    """Episodes of the candidate and of the router in the artefact `released`, as `compare_routers` reads them.

    Raises:
        UserError: the candidate was trained for other precisions than there are now.
    """
    import torch
    from rich.progress import Progress

    from dmr_pipeline.environments.tasks import read_tasks
    from dmr_pipeline.evaluation.play import Entry, evaluate
    from dmr_pipeline.precision.ladder import Ladder
    from dmr_pipeline.router.kl import ROUTER_FOLDER
    from dmr_pipeline.router.model import load_router
    from dmr_pipeline.router.policies import routing_policy

    rule, checkpoints = context.recipe.release, context.inputs["quantized_checkpoints"]
    if folder_hash(hash_files(checkpoints)) != candidate.ladder:
        raise UserError(
            f"{context.inputs['grpo_router']} was trained for another precision ladder than {checkpoints}: "
            f"bring it up to date with `dmr run {context.recipe.name}`"
        )
    torch.set_num_threads(context.recipe.runtime.threads)
    # `evaluate` draws actions (at a temperature) by the evaluation's seed, of which this stage knows nothing.
    recipe = context.recipe.model_copy(update={"evaluation": Evaluation(seed=rule.seed)})
    ladder = Ladder.load(checkpoints, recipe)
    games = read_tasks(context.inputs["benchmark_tasks"], "validation", rule.games)
    entries = []
    for name, artefact in ((RELEASED, released), (CANDIDATE, context.inputs["grpo_router"])):
        router = load_router(artefact / ROUTER_FOLDER, ladder.device, ladder.models[False])
        policy = routing_policy(router, ladder.slots(len(games)))
        entries.append(Entry(name, "router", policy, router_bytes=router.weight_bytes))
    with Progress() as progress:
        return pl.concat(evaluate(entries, ladder, games, progress, " router on validation").values())


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
    """From the folder of the artefact `released_router`.

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
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'releases'}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {problems}; {remedy}") from error


def _read_previous(context: StageContext) -> History:
    return () if context.previous is None else read_releases(context.previous).decisions


def _decision(
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


def _write(context: StageContext, history: History, source: Path) -> StageResult:
    """Args: source: the artefact, of either stage, that holds the router now in use."""
    from dmr_pipeline.router.kl import ROUTER_FOLDER

    shutil.copytree(source / ROUTER_FOLDER, context.output / ROUTER_FOLDER)
    current, latest = in_use(history), history[-1]
    text = Releases(current=current.number, decisions=history).model_dump_json(indent=2) + "\n"
    (context.output / RELEASES_FILE).write_text(text, encoding="utf-8")
    log.info("released_router: router %s is in use, by decision %d", current.router[:7], current.number)
    return StageResult(
        summary={
            "release": current.number,
            "router": current.router,
            "latest_decision": f"{latest.number}: {latest.decision}",
            "latest_reason": latest.reason,
        }
    )
