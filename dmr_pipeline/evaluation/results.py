"""What an evaluation found, as its `metrics.json` holds it; apart from what computes it, so that a report is shown in no time."""

import json
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

Kind = Literal["single", "rung", "speculative", "random", "router", "ablation", "baseline", "oracle"]
STATIC: tuple[Kind, ...] = ("single", "rung", "speculative")
"""Policies that decide nothing: the same rung of the ladder always acts, by itself or by checking what a cheaper one drafts. A
router is worth what it does better than these and mixtures of their whole episodes."""
Interval = list[float]
"""[low, high]"""


def checking_name(rung: str, drafter: str) -> str:
    """Of the policy in which a rung checks what another one drafts."""
    return f"speculative:{rung}<{drafter}"


class TaskTypeMetrics(TypedDict):
    """One policy on the games of one task type."""

    n: int
    success: float
    ci95: Interval
    score: NotRequired[float]
    score_ci95: NotRequired[Interval]
    high_ratio: float


class PolicyMetrics(TypedDict):
    """One policy. Rates are shares in [0, 1]; intervals are [low, high] at the confidence of the metrics."""

    kind: Kind
    success: float
    """Mean over games of the mean over draws."""
    ci95: Interval
    score: NotRequired[float]
    """Mean reward, in [0, 1], over games of the mean over draws. Absent where every reward of the evaluation is 0 or 1."""
    score_ci95: NotRequired[Interval]
    high_ratio: float
    """Steps of the dearest routed rung / steps, over all episodes together."""
    token_high_ratio: float
    """Tokens that the dearest routed rung read / tokens read, over all episodes together."""
    shares: dict[str, float]
    """Routed rung -> its steps / steps, dearest first."""
    spend: float
    """Mean over the steps, from 0 (the cheapest routed rung) to 1 (the dearest), in bytes; of two rungs, `high_ratio`."""
    mean_bits: float
    """Bits per weight of the acting rung, mean over the steps."""
    cost: float
    """Mean over games, in the unit of rollout/cost.py: weights, the router's among them, and KV cache."""
    cost_ci95: Interval
    cost_cache: float
    """The part of `cost` that is read from the KV cache."""
    cost_per_success: float | None
    """Total cost / successes; null without a success."""
    tokens: float
    """Mean tokens an episode that forward passes read, a catch-up after a switch and what was thrown away included: what a
    switch costs in compute and not in bytes."""
    steps: float
    """Mean over games."""
    acting_passes: float
    """Forward passes of the acting precision a step: one a token that it writes, fewer where it looks up what it writes,
    one a draft that it checks."""
    accepted: NotRequired[float]
    """Of the tokens that a cheaper precision drafted, the share that the acting one took. Absent where nothing was drafted."""
    switches: float
    """Mean changes of precision an episode."""
    parse_failures: float
    """Share of the steps whose action was none as the prompt wants it: unfinished, without a thought's end, or empty."""
    failures: dict[str, float]
    """Each of these -> its share of the steps; and `inadmissible`, the share of those whose command could be read and does
    nothing (rollout/failures.py)."""
    n: int
    """Games."""
    episodes: int
    by_task_type: dict[str, TaskTypeMetrics]
    gap_recovered: NotRequired[float | None]
    """(success - low) / (high - low), not clipped; null where high is not above low. Absent for single precisions."""
    gap_ci95: NotRequired[Interval | None]
    gain_at_equal_cost: float
    """Success minus what static policies and mixtures of their whole episodes reach at this cost: above the best rung's cost its
    success, below the cheapest one's cost the cheapest one's. Of a static policy 0, or less where it is not on the hull."""
    gain_ci95: Interval


class HullPoint(TypedDict):
    """A static policy on the hull."""

    policy: str
    cost: float
    success: float


class PairedComparison(TypedDict):
    """Two policies on the same games."""

    policy: str
    against: str
    difference: float
    """Success of `policy` minus success of `against`."""
    ci95: Interval
    p_value: float
    """Exact two-sided permutation test over games (`statistics.paired_p_value`); 0 stands for less than 0.0000005."""
    p_holm: float | None
    """The same, corrected by Holm for the planned comparisons; null where this one was not planned."""
    smallest_difference: float | None
    """What as many games, on which the two differ as often, show with a chance of 80% in one such test; null for nothing."""
    wins: int
    """Games that `policy` solves more often."""
    losses: int
    ties: int
    cost_difference: float


class NonInferiority(TypedDict):
    """Is the headline router no worse than always-high by a margin?"""

    margin: float
    lower: float
    """Lower end of the interval of the paired difference in success."""
    games_needed: int
    """With fewer games not even a router that loses none could show it."""
    shown: bool


class Gap(TypedDict):
    """High minus low."""

    difference: float
    ci95: Interval
    resamples_without_gap: float
    """Share of the resamples in which high is not above low; they are left out of the intervals of gap recovered."""


class Curve(TypedDict):
    """The routing curve from always-low through the policies of one kind to always-high."""

    apgr: float | None
    """Mean gap recovered over all spends, of two rungs the high-precision ratios (RouteLLM)."""
    cpt50: float | None
    """Smallest spend that recovers 50% of the gap (RouteLLM)."""
    cpt80: float | None
    aiq: float | None
    """Mean success over cost on the non-decreasing convex hull (RouterBench)."""


class CurvePoint(TypedDict):
    """A policy at the bar that a budget has led to; on validation games, and on the test games."""

    budget: float
    """Spend that was asked for, at most."""
    threshold: float
    """See `router.budgets.Bar`."""
    ties: float
    validation_spend: float
    validation_success: float
    validation_cost: float
    success: float
    ci95: Interval
    spend: float
    """As in `PolicyMetrics`, like the others."""
    spend_ci95: Interval
    cost: float
    cost_ci95: Interval
    gain_at_equal_cost: float
    gain_ci95: Interval


class PolicyCurve(TypedDict):
    """A router or a rule at all budgets. Null where high is not above low, or where all cost the same."""

    kind: Literal["router", "rule"]
    points: list[CurvePoint]
    """In the order of the budgets."""
    apgr: float | None
    """This and the next ones as in `Curve`, of these points."""
    apgr_ci95: Interval | None
    cpt50: float | None
    cpt80: float | None
    aiq: float | None
    """All curves over the same span of costs."""
    aiq_ci95: Interval | None
    mean_gain: float
    """Mean of the points' gains at equal cost."""
    mean_gain_ci95: Interval


class BestRule(TypedDict):
    """The rule that a router is compared with: of all that cost no more on validation games, the one that wins most there."""

    rule: str
    budget: float
    validation_success: float
    validation_cost: float
    router_validation_cost: float


class Metrics(TypedDict):
    """`metrics.json`."""

    recipe: str
    route: list[str]
    """Rungs that routers choose from, dearest first."""
    high: str
    low: str
    headline: str
    confidence: float
    gap: Gap
    policies: dict[str, PolicyMetrics]
    hull: list[HullPoint]
    """The static policies that no other one and no mixture of two beats at their cost, the cheapest first."""
    below_hull: dict[str, str]
    """Each other static policy -> the one that dominates it, at least as good and not dearer; or `mixture`, where only a mixture
    of two beats it at its cost."""
    non_inferiority: NonInferiority
    paired: list[PairedComparison]
    """The planned ones first."""
    apgr: float | None
    cpt50: float | None
    cpt80: float | None
    aiq: float | None
    random_curve: Curve
    """The same four for the random policies, the reference for the routers' own."""
    curves: NotRequired[dict[str, PolicyCurve]]
    """Router or rule -> its curve, where the recipe names budgets."""
    best_rules: NotRequired[dict[str, BestRule]]
    """Router -> the rule that is the policy `rule@` and its name; likewise."""


POLICIES = frozenset(
    {
        "always_high",
        "always_low",
        "confidence",
        "kl_router",
        "grpo_router",
        "random@kl_router",
        "random@grpo_router",
        "disagreement",
    }
)
"""What every evaluation compares."""


def shown_name(name: str, metrics: Metrics) -> str:
    """A policy's name in words."""
    rungs = {metrics["high"]: metrics["route"][0], metrics["low"]: metrics["route"][-1]}
    kind = metrics["policies"][name]["kind"]
    if kind in ("single", "rung"):
        return f"{rungs.get(name, name.removeprefix('always_'))} alone"
    if kind == "speculative":
        checks, _, drafts = name.partition(":")[2].partition("<")
        return f"{drafts} drafts, {checks} checks"
    if kind == "random":
        return f"random, as often as {name.removeprefix('random@')}"
    if kind == "oracle":
        return f"{name} (oracle)"
    best = metrics.get("best_rules", {}).get(name.removeprefix("rule@"))
    if best is not None and name.startswith("rule@"):
        return f"{best['rule']} rule at {best['budget']:g}"
    return f"{name}, the chosen router" if name == metrics["headline"] else name


def read_metrics(folder: Path) -> Metrics:
    """Of the artifact in `folder`."""
    metrics: Metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def failures_of(metrics: Metrics) -> list[str]:
    """What cannot be true of an evaluation, a line each: a policy is missing, or numbers contradict each other."""
    policies = metrics["policies"]
    failures = [f"{name} is missing" for name in sorted(POLICIES - policies.keys())]
    for name, policy in policies.items():
        low, high = policy["ci95"]
        if not 0 <= low <= policy["success"] <= high <= 1:
            failures.append(f"{name}: success {policy['success']} with interval {low} to {high}")
        if "score" in policy and not policy["success"] <= policy["score"] <= 1:
            failures.append(f"{name}: score {policy['score']} with success {policy['success']}")
        if not 0 <= policy["high_ratio"] <= 1 or not 0 <= policy["spend"] <= 1:
            failures.append(f"{name}: high-precision ratio {policy['high_ratio']}, spend {policy['spend']}")
        if not 0 <= policy["parse_failures"] <= sum(policy["failures"].values()) + 1e-5 <= 1 + 2e-5:
            failures.append(f"{name}: parse failures {policy['parse_failures']}, failures {policy['failures']}")
        if policy["cost"] <= 0 or policy["n"] <= 0:
            failures.append(f"{name}: cost {policy['cost']} over {policy['n']} games")
    for name, ratio in ((metrics["high"], 1.0), (metrics["low"], 0.0)):
        if name in policies and policies[name]["high_ratio"] != ratio:
            failures.append(f"{name}: high-precision ratio {policies[name]['high_ratio']}, which must be {ratio:.0f}")
    if len({policy["n"] for policy in policies.values()}) > 1:
        failures.append("not all policies played the same number of games")
    for pair in metrics["paired"]:
        low, high = pair["ci95"]
        if not low <= pair["difference"] <= high:
            failures.append(f"{pair['policy']} against {pair['against']}: {pair['difference']} outside {low} to {high}")
    return failures
