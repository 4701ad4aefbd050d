"""What each rung of the precision ladder costs and wins, measured in closed loop before any router is trained, and the verdict:
between which rungs routing can pay, and how much at most, or which rung to deploy without a router.

The front holds the rungs that no other one beats: a rung is dominated where another wins as many validation games for less, or
more for no more. The verdict's rule is ours. The dear end of a route is the cheapest rung on the front that is not worse than
the ladder's dearest by more than a stated margin: whatever is dearer buys nothing that the games can show. The rest of the route
are the rungs on the front that cost clearly less. What routing can bring at most is the corner of the two ends: the success of
the dear end at the cost of the cheap one.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dmr_pipeline.intervals import paired_interval, wilson
from dmr_pipeline.precision.hull import dominators
from dmr_pipeline.precision.ladder import LadderFacts, RungFacts, RungPlayed, Verdict
from dmr_pipeline.recipe import Precisions

PLAYED_FILE = "validation.parquet"
PLAYED = pl.Schema(
    {
        "rung": pl.String(),
        "task_id": pl.String(),
        "success": pl.Boolean(),
        "steps": pl.Int64(),
        "cost": pl.Float64(),
        "cost_cache": pl.Float64(),
    }
)
"""One row a rung and validation game. Costs are in the unit of `LadderFacts.unit_bytes`; `cost_cache` is
the part of `cost` that is keys and values."""


def played_facts(
    facts: Sequence[RungFacts], played: pl.DataFrame, unit_bytes: float, precisions: Precisions
) -> LadderFacts:
    """The ladder as it plays, and the verdict.

    Args:
        facts: of each rung, in the ladder's order.
        played: rows of `PLAYED`; every rung on the same games.
    """
    games = {rung.name: played.filter(rung=rung.name).sort("task_id") for rung in facts}
    won = {name: rows["success"].to_numpy() for name, rows in games.items()}
    points = {name: (_mean(rows["cost"]), _mean(rows["success"])) for name, rows in games.items()}
    level, dearest, dominated = precisions.confidence, facts[0].name, dominators(points)
    interval = {name: wilson(float(games_won.mean()), len(games_won), level) for name, games_won in won.items()}
    lost = {name: paired_interval(won[dearest], games_won, level) for name, games_won in won.items()}
    rungs = [
        RungPlayed(
            **rung.model_dump(),
            validation_success=points[rung.name][1],
            success_low=_rounded(interval[rung.name][0]),
            success_high=_rounded(interval[rung.name][1]),
            validation_steps=_mean(games[rung.name]["steps"]),
            cost=points[rung.name][0],
            cost_cache=_mean(games[rung.name]["cost_cache"]),
            lost=_rounded(points[dearest][1] - points[rung.name][1]),
            lost_low=_rounded(lost[rung.name][0]),
            lost_high=_rounded(lost[rung.name][1]),
            dominated_by=dominated.get(rung.name, ""),
        )
        for rung in facts
    ]
    verdict = judge(rungs, won, precisions)
    found = verdict.route if verdict.pays else precisions.fallback
    return LadderFacts(
        rungs=rungs,
        verdict=verdict,
        route=found if precisions.route == "auto" else precisions.route,
        unit_bytes=unit_bytes,
        games=len(won[dearest]),
        confidence=level,
    )


def judge(rungs: Sequence[RungPlayed], won: dict[str, NDArray[np.bool_]], precisions: Precisions) -> Verdict:
    """The verdict (see the module).

    Args:
        rungs: in the ladder's order.
        won: rung -> whether it won, a validation game each, in the same order.
    """
    front = [rung for rung in rungs if not rung.dominated_by]
    fit = [rung for rung in front if rung.lost_high < precisions.margin]
    best = max(front, key=lambda rung: rung.validation_success)
    dear = min(fit, key=lambda rung: rung.cost, default=best)
    route = [dear]
    for rung in sorted(front, key=lambda rung: -rung.cost):
        if rung.cost <= (1 - precisions.least_saving) * dear.cost and rung.pass_bytes < route[-1].pass_bytes:
            route.append(rung)
    names = tuple(rung.name for rung in route)
    if len(route) == 1:
        return Verdict(pays=False, route=names, deploy=dear.name, text=_no_gain(rungs, dear, bool(fit), precisions))
    cheap = route[-1]
    low, high = paired_interval(won[dear.name], won[cheap.name], precisions.confidence)
    saved, gained = 1 - cheap.cost / dear.cost, 100 * (dear.validation_success - cheap.validation_success)
    text = (
        f"Routing can pay between {_list([_point(rung) for rung in route])}: at most {saved:.0%} of the cost of {dear.name} at"
        f" its success, or {gained:.1f} points of success at the cost of {cheap.name} ({precisions.confidence:.0%} interval"
        f" {100 * low:.1f} to {100 * high:.1f}, {len(won[dear.name])} validation games)."
    )
    return Verdict(pays=True, route=names, deploy=dear.name, text=text)


def clearly_beaten(rungs: Sequence[RungPlayed]) -> dict[str, str]:
    """The rungs that no other games need to tell from a better one -> that one, the best: it costs no more, and the intervals of
    their success lie apart. This rule is ours."""
    beaten = {}
    for rung in rungs:
        better = [other for other in rungs if other.cost <= rung.cost and other.success_low > rung.success_high]
        if better:
            beaten[rung.name] = max(better, key=lambda other: other.validation_success).name
    return beaten


def _no_gain(rungs: Sequence[RungPlayed], dear: RungPlayed, fit: bool, precisions: Precisions) -> str:
    first, margin = rungs[0], f"{100 * precisions.margin:.0f} points"
    if dear is first:
        standing = "is the best there is"
    elif fit:
        standing = f"is at most {margin} worse than {_point(first)}"
    else:
        standing = f"wins the most, though it may be more than {margin} worse than {_point(first)}"
    saving = f"no smaller rung on the front costs {precisions.least_saving:.0%} less"
    return f"Routing cannot pay: {_point(dear)} {standing}, and {saving}. Deploy {dear.name}."


def _point(rung: RungPlayed) -> str:
    return f"{rung.name} ({rung.validation_success:.1%} at a cost of {rung.cost:.3f})"


def _list(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _mean(values: pl.Series) -> float:
    return _rounded(values.mean())  # type: ignore[arg-type]


def _rounded(value: float) -> float:
    return round(float(value), 6)
