"""The policies of the report, on the test games; the headline router is chosen on validation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import polars as pl
from pydantic import JsonValue
from rich.progress import Progress

from dmr_pipeline.environments.base import Task
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.metrics import shares_of_steps
from dmr_pipeline.evaluation.play import Arena, Entry, checking_entry, evaluate
from dmr_pipeline.recipe.evaluation import Evaluation
from dmr_pipeline.recipe.grpo_router import GrpoRouter
from dmr_pipeline.recipe.precisions import Speculative
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.cost import reward
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.policy import RoutingPolicy, SinglePrecision
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.baselines import Confidence, Disagreement, RandomMixing
from dmr_pipeline.router.calibration import OperatingPoint, find_threshold
from dmr_pipeline.router.model import Router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.router.search_steps import opens_at_search_bar, with_searches_forced

ROUTERS = ("kl_router", "grpo_router")
HEADLINE_RATIO = 0.40
"""Spend on validation, of two rungs the high-precision ratio, that the headline router should stay under: the larger of the
paper's budgets K."""


def play_test(
    arena: Arena,
    routers: Mapping[str, Router],
    files: Mapping[str, JsonValue],
    cascade: Confidence,
    games: Sequence[Task],
    section: Evaluation,
    progress: Progress,
    kept: KeptTables,
    known: Known,
    shown: dict[str, pl.DataFrame],
) -> list[pl.DataFrame]:
    """Rows of all policies but the rungs alone, in the report's order. Arguments as of `router_entries` and `evaluate`."""
    rollouts = arena.rollouts
    slots, route = rollouts.slots(len(games)), rollouts.route
    compared = entries(route, routers, files, cascade, slots)
    if rollouts.can_draft:
        compared += speculative_entries(route, rollouts.speculative)
    if opens_at_search_bar(games[0]):
        compared += search_entries(route, routers, files, slots)
    # These first: the others come by many of their transcripts.
    in_turn = sorted(compared, key=lambda entry: entry.name not in ("always_high", "always_low", "disagreement"))
    played = evaluate(in_turn, arena, games, progress, kept=kept, known=known, shown=shown)
    mixes = {name: random_mix(name, played[name], route, section.seed, section.random_draws) for name in routers}
    played |= evaluate(list(mixes.values()), arena, games, progress, kept=kept, known=known)
    names = [[entry.name] + ([mixes[entry.name].name] if entry.name in mixes else []) for entry in compared]
    return [played[name] for name in chain(*names)]


def entries(
    route: Sequence[str],
    routers: Mapping[str, Router],
    files: Mapping[str, JsonValue],
    cascade: Confidence,
    slots: int,
) -> list[Entry]:
    """Policies to evaluate, but for random mixing. Arguments as of `router_entries`."""
    return [
        Entry("always_high", "single", SinglePrecision(route[0], route)),
        Entry("always_low", "single", SinglePrecision(route[-1], route)),
        *(Entry(f"always_{rung}", "rung", SinglePrecision(rung, route)) for rung in route[1:-1]),
        Entry("confidence", "baseline", cascade, {"threshold": cascade.threshold}),
        *router_entries(routers, files, slots),
        Entry("disagreement", "oracle", Disagreement(route)),
    ]


def speculative_entries(route: Sequence[str], settings: Speculative | None) -> list[Entry]:
    """Each rung but the cheapest acts alone and only checks: the next cheaper one drafts.

    Args:
        settings: of the recipe.
    """
    return [checking_entry(pair, route, route, settings) for pair in pairwise(route)]


def speculative_differences(episodes: pl.DataFrame) -> list[str]:
    """Greedy acting: where a policy that only checks did not do what the same precision does when it writes, a sentence each.

    A draft is read at once, so logits are rounded otherwise than token by token, and a near tie may fall the other way. More than
    single games would be an error.

    Args:
        episodes: rows of `PLAYED` of all policies.
    """
    outcome = ["success", "reward", "steps"]
    speculative = episodes.filter(kind="speculative")
    written = episodes.select("policy", "task_id", *outcome)
    pairs = speculative.join(
        written, left_on=["variant_of", "task_id"], right_on=["policy", "task_id"], suffix="_written"
    )
    apart = pl.any_horizontal(pl.col(name) != pl.col(f"{name}_written") for name in outcome)
    counts = pairs.group_by("policy", "variant_of", maintain_order=True).agg(apart.sum().alias("apart"), pl.len())
    return [
        f"{policy} ended otherwise than {other} in {games} of {count} games, which only near ties between tokens can explain."
        for policy, other, games, count in counts.iter_rows()
        if games
    ]


def router_entries(routers: Mapping[str, Router], files: Mapping[str, JsonValue], slots: int) -> list[Entry]:
    """
    Args:
        files: name of a router -> what it was loaded from, by content.
        slots: episodes at once.
    """
    return [
        Entry(name, "router", routing_policy(router, slots), {"router": files[name]}, router=router.pass_bytes)
        for name, router in routers.items()
    ]


def search_entries(
    route: Sequence[str], routers: Mapping[str, Router], files: Mapping[str, JsonValue], slots: int
) -> list[Entry]:
    """What forcing search steps does: each router with it switched, its threshold as it is; and searches alone at the dearest
    precision, the rest at the cheapest, which needs no router. Arguments as of `router_entries`."""
    searches_alone = with_searches_forced(SinglePrecision(route[-1], route), route)
    compared = [Entry("search_only", "baseline", searches_alone)]
    for name, router in routers.items():
        forced = router.settings.force_search
        switched = replace(router, settings=router.settings.model_copy(update={"force_search": not forced}))
        compared.append(
            Entry(
                f"{name}{'-' if forced else '+'}search",
                "ablation",
                routing_policy(switched, slots),
                {"router": files[name]},
                router=router.pass_bytes,
                variant_of=name,
            )
        )
    return compared


def random_mix(router: str, played: pl.DataFrame, route: Sequence[str], seed: int, draws: int) -> Entry:
    """Random mixing with the shares at which a router has played."""
    shares = shares_of_steps(played, route)
    parameters: dict[str, JsonValue] = {"shares": dict(shares), "seed": seed}
    return Entry(f"random@{router}", "random", RandomMixing(shares, seed), parameters, draws, variant_of=router)


def confidence_cascade(
    arena: Arena, games: Sequence[Task], section: Evaluation, progress: Progress, kept: KeptTables, known: Known
) -> Confidence:
    """At the threshold that gives the recipe's ratio at most, in closed loop on validation games."""
    rollouts, runs = arena.rollouts, [RolloutRequest(game) for game in games]
    bar = progress.add_task("confidence on validation", total=None)

    def play(threshold: float) -> list[Trajectory]:
        policy = Confidence(rollouts.route, threshold)
        return rollouts.play(runs, policy, arena.seed, on_progress=lambda n: progress.advance(bar, n), known=known)

    def play_at(threshold: float) -> OperatingPoint:
        return OperatingPoint.of(threshold, play(threshold), rollouts.acting.spend)

    facts: dict[str, JsonValue] = {"confidence_ratio": section.confidence_ratio, "confidence_games": len(games)}
    found = kept.read(**facts)
    if found is None:
        doubts = np.array([step.exceedance[-1] for trajectory in play(math.inf) for step in trajectory.steps])
        point, _ = find_threshold(play_at, doubts, section.confidence_ratio)
        found = pl.DataFrame({"threshold": [point.threshold]})
        kept.write(found, **facts)
    progress.update(bar, total=1, completed=1)
    return Confidence(rollouts.route, found["threshold"].item())


def choose_headline(played: Mapping[str, pl.DataFrame], section: GrpoRouter) -> tuple[str, dict[str, dict[str, float]]]:
    """The router with the higher mean reward of stage 2, which weighs success and cost as the recipe does, among those whose
    ratio is within HEADLINE_RATIO (all, if none's is). This rule is ours.

    Args:
        played: router -> rows of `metrics.EPISODES` on validation games.

    Returns:
        Beside its name, what each router does on these games.
    """
    found: dict[str, dict[str, float]] = {}
    for name, frame in played.items():
        rewards = [reward(won, cost, section) for won, cost in frame.select("success", "cost").iter_rows()]
        found[name] = {
            "stage_2_reward": round(float(np.mean(rewards)), 6),
            "success": round(float(frame["success"].mean()), 6),  # type: ignore[arg-type]
            "spend": round(float(frame["spend"].sum()) / _steps(frame), 6),
            "cost": round(float(frame["cost"].mean()), 6),  # type: ignore[arg-type]
        }
    within = [name for name in found if found[name]["spend"] <= HEADLINE_RATIO] or list(found)
    return max(within, key=lambda name: found[name]["stage_2_reward"]), found


TIMED_SECONDS = 30.0


def seconds_per_step(policy: RoutingPolicy, arena: Arena, games: Sequence[Task]) -> dict[str, JsonValue]:
    """One episode at a time, as an interactive agent runs: mean and p95 of a step, and the router's share of it. After
    `TIMED_SECONDS` no other episode begins: a large agent's steps take seconds each."""
    seconds: list[float] = []
    router = 0.0
    for game in games:
        if sum(seconds) > TIMED_SECONDS:
            break
        clock = Timings()
        arena.rollouts.play([RolloutRequest(game)], policy, arena.seed, clock)
        seconds += clock.durations
        router += clock.router
    return {
        "mean": float(np.mean(seconds)),
        "p95": float(np.quantile(seconds, 0.95)),
        "router_share": router / sum(seconds),
    }


def _steps(episodes: pl.DataFrame) -> float:
    return float(episodes["steps"].sum())
