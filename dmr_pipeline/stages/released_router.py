"""Stage `released_router`: the router in use, and the decisions about it by hand (see release/history.py)."""

import logging
import shutil
from pathlib import Path

import polars as pl

from dmr_pipeline.artifacts.manifest import folder_hash, hash_files
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.play import Arena, Entry, evaluate
from dmr_pipeline.progress import Bars
from dmr_pipeline.release.comparison import CANDIDATE, RELEASED, compare_routers, games_of
from dmr_pipeline.release.history import (
    RELEASES_FILE,
    Candidate,
    History,
    Releases,
    decide,
    earlier_release,
    in_use,
    next_decision,
    read_releases,
)
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import load_router
from dmr_pipeline.router.policies import routing_policy

log = logging.getLogger(__name__)


def released_router(context: StageContext) -> StageResult:
    """Release the candidate if it is the first one, or if it is not worse than the router in use.

    Raises:
        UserError: the history is malformed, or the candidate was trained for other precisions than there are now.
    """
    grpo_router, released, rule = context.inputs["grpo_router"], context.previous, context.recipe.release
    candidate = Candidate.of(grpo_router)
    if released is None:
        return _write(context, (next_decision((), candidate, "first", "there was no release before"),), grpo_router)
    history = read_releases(released).decisions
    number = len(history) + 1
    decision = decide(
        history, candidate, rule, lambda: compare_routers(play_both(context, released, candidate, number), rule)
    )
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
    decision = next_decision(history, candidate, "promoted_by_hand", "by hand")
    return _write(context, (*history, decision), context.inputs["grpo_router"])


def roll_back(context: StageContext, to: int, router: Path) -> StageResult:
    """Release an earlier router again: somebody decided so. It is a decision of its own, so that no history is lost.

    Args:
        to: number of the decision that released it.
        router: folder of the artifact `grpo_router` of that time.

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
    decision = next_decision(history, found, "rolled_back", f"by hand, back to release {to}")
    return _write(context, (*history, decision), router)


def play_both(context: StageContext, released: Path, candidate: Candidate, number: int) -> pl.DataFrame:
    """Episodes of the candidate and of the router in the artifact `released`, as `compare_routers` reads them.

    Args:
        number: of the decision, which says on which games they play.

    Raises:
        UserError: the candidate was trained for other precisions than there are now.
    """
    rule, checkpoints = context.recipe.release, context.inputs["quantized_checkpoints"]
    if folder_hash(hash_files(checkpoints)) != candidate.ladder:
        raise UserError(
            f"{context.inputs['grpo_router']} was trained for another precision ladder than {checkpoints}: "
            f"bring it up to date with `dmr run {context.recipe.name}`"
        )
    arena = Arena.load(checkpoints, context.recipe, rule.seed)
    acting = arena.rollouts.acting
    validation = benchmark_of(context.recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "validation")
    games = [validation[position] for position in games_of(number, len(validation), rule)]
    entries = []
    for name, artifact in ((RELEASED, released), (CANDIDATE, context.inputs["grpo_router"])):
        router = load_router(artifact / ROUTER_FOLDER, acting.device, acting.models[acting.cheapest])
        policy = routing_policy(router, arena.rollouts.slots(len(games)))
        entries.append(Entry(name, "router", policy, router=router.pass_bytes))
    with Bars() as progress:
        return pl.concat(evaluate(entries, arena, games, progress, " router on validation").values())


def _write(context: StageContext, history: History, source: Path) -> StageResult:
    """The artifact: the router in use, and the history of decisions.

    Args:
        source: the artifact, of either stage, that holds the router now in use.
    """
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


def _read_previous(context: StageContext) -> History:
    return () if context.previous is None else read_releases(context.previous).decisions
