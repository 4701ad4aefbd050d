"""What each rung of the precision ladder costs and wins, measured in closed loop before any router is trained, and the verdict:
between which rungs routing can pay, and how much at most, or which rung to deploy without a router.

The front holds the rungs that no other one beats: a rung is dominated where another wins as many validation games for less, or
more for no more. The verdict's rule is ours. The dear end of a route is the cheapest rung on the front that is not worse than
the ladder's dearest by more than a stated margin: whatever is dearer buys nothing that the games can show. It is the rung to
deploy, and may act by checking what a cheaper one drafts, which needs no router either: it costs what the cheaper way costs. The
rest of the route are the rungs on the front that cost clearly less than that. What routing can bring at most is the corner of the
two ends: the success of the dear end at the cost of the cheap one.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import polars as pl

from dmr_pipeline.intervals import paired_interval, wilson
from dmr_pipeline.precision.hull import dominators
from dmr_pipeline.precision.ladder import Checked, LadderFacts, RungFacts, RungPlayed, Verdict, nothing_to_lose
from dmr_pipeline.recipe.precisions import Precisions

K = TypeVar("K", str, int)

PLAYED_FILE = "validation.parquet"
PLAYED = pl.Schema(
    {
        "rung": pl.String(),
        "task_id": pl.String(),
        "success": pl.Boolean(),
        "steps": pl.Int64(),
        "parse_failures": pl.Int64(),
        "cost": pl.Float64(),
        "cost_cache": pl.Float64(),
    }
)
"""One row a rung and validation game. `parse_failures` are the steps whose action was none as the prompt wants it. Costs are in
the unit of `LadderFacts.unit_bytes`; `cost_cache` is the part of `cost` that is keys and values."""


def rungs_played(facts: Sequence[RungFacts], played: pl.DataFrame, precisions: Precisions) -> list[RungPlayed]:
    """Each rung as it plays alone.

    Args:
        facts: of each rung, in the ladder's order.
        played: rows of `PLAYED`; every rung on the same games, or on some of them where it was beaten there.
    """
    games = {rung.name: played.filter(rung=rung.name).sort("task_id") for rung in facts}
    won = {name: rows["success"].to_numpy() for name, rows in games.items()}
    points = {name: (_mean(rows["cost"]), _mean(rows["success"])) for name, rows in games.items()}
    level, dearest = precisions.confidence, facts[0].name
    interval = {name: wilson(float(games_won.mean()), len(games_won), level) for name, games_won in won.items()}
    by_dearest = {name: _on_games_of(rows, games[dearest])["success"].to_numpy() for name, rows in games.items()}
    lost = {name: paired_interval(by_dearest[name], games_won, level) for name, games_won in won.items()}
    stopped = {name: len(rows) for name, rows in games.items() if len(rows) < len(games[dearest])}
    dominated = dominators({name: point for name, point in points.items() if name not in stopped})
    whole = {name: rows for name, rows in games.items() if name not in stopped}
    dominated |= {name: beaten_by(games[name], whole, level) or "" for name in stopped}
    return [
        RungPlayed(
            **rung.model_dump(),
            validation_success=points[rung.name][1],
            success_low=_rounded(interval[rung.name][0]),
            success_high=_rounded(interval[rung.name][1]),
            validation_steps=_mean(games[rung.name]["steps"]),
            parse_failures=_rounded(
                int(games[rung.name]["parse_failures"].sum()) / int(games[rung.name]["steps"].sum())
            ),
            cost=points[rung.name][0],
            cost_cache=_mean(games[rung.name]["cost_cache"]),
            lost=_rounded(_rounded(by_dearest[rung.name].mean()) - points[rung.name][1]),
            lost_low=_rounded(lost[rung.name][0]),
            lost_high=_rounded(lost[rung.name][1]),
            dominated_by=dominated.get(rung.name, ""),
            games=stopped.get(rung.name),
        )
        for rung in facts
    ]


def to_deploy(rungs: Sequence[RungPlayed], precisions: Precisions) -> RungPlayed:
    """The dear end of a route (see the module)."""
    front = [rung for rung in rungs if not rung.dominated_by]
    best = max(front, key=lambda rung: rung.validation_success)
    return min(_fit(front, precisions), key=lambda rung: rung.cost, default=best)


def checked_facts(drafter: str, played: pl.DataFrame) -> Checked:
    """
    Args:
        played: an episode of each validation game, with the columns success, steps, passes (of the rung that checks), drafted and
            accepted (tokens), cost and cost_cache.
    """
    tokens = int(played["drafted"].sum())
    return Checked(
        drafter=drafter,
        validation_success=_mean(played["success"]),
        cost=_mean(played["cost"]),
        cost_cache=_mean(played["cost_cache"]),
        passes=_rounded(int(played["passes"].sum()) / int(played["steps"].sum())),
        accepted=_rounded(int(played["accepted"].sum()) / tokens) if tokens else 0.0,
    )


def drafters(rungs: Sequence[RungPlayed], dear: RungPlayed) -> list[str]:
    """The rungs whose drafts it might check: those that read less a pass."""
    return [rung.name for rung in rungs if rung.pass_bytes < dear.pass_bytes]


def ladder_facts(
    rungs: Sequence[RungPlayed],
    checked: Sequence[Checked],
    played: pl.DataFrame,
    unit_bytes: float,
    precisions: Precisions,
) -> LadderFacts:
    """The ladder as it plays, and the verdict.

    Args:
        rungs: as of `rungs_played`.
        checked: of `to_deploy`, by each drafter.
        played: rows of `PLAYED` of all rungs.
    """
    verdict = judge(rungs, checked, played, precisions)
    found = verdict.route if verdict.pays else precisions.fallback
    return LadderFacts(
        rungs=list(rungs),
        checked=list(checked),
        verdict=verdict,
        route=found if precisions.route == "auto" else precisions.route,
        unit_bytes=unit_bytes,
        games=played["task_id"].n_unique(),
        confidence=precisions.confidence,
    )


def judge(
    rungs: Sequence[RungPlayed], checked: Sequence[Checked], played: pl.DataFrame, precisions: Precisions
) -> Verdict:
    """The verdict (see the module). Arguments as of `ladder_facts`."""
    dear, best = to_deploy(rungs, precisions), min(checked, key=lambda one: one.cost, default=None)
    check = best if best is not None and best.cost < dear.cost else None
    spent = dear.cost if check is None else check.cost
    route = [dear]
    for rung in sorted((rung for rung in rungs if not rung.dominated_by), key=lambda rung: -rung.cost):
        if rung.cost <= (1 - precisions.least_saving) * spent and rung.pass_bytes < route[-1].pass_bytes:
            route.append(rung)
    pays = len(route) > 1 and not nothing_to_lose(rungs, precisions.margin)
    return Verdict(
        pays=pays,
        route=tuple(rung.name for rung in route),
        deploy=dear.name,
        drafter="" if check is None else check.drafter,
        text=_gain(route, check, played, precisions) if pays else _no_gain(rungs, dear, check, precisions),
    )


def _fit(front: Sequence[RungPlayed], precisions: Precisions) -> list[RungPlayed]:
    """Those that are not worse than the ladder's dearest rung."""
    return [rung for rung in front if rung.lost_high < precisions.margin]


def clearly_beaten(rungs: Sequence[RungPlayed]) -> dict[str, str]:
    """The rungs that no other games need to tell from a better one -> that one, the best: it costs no more, and the intervals of
    their success lie apart. This rule is ours."""
    beaten = {}
    for rung in rungs:
        if rung.games is not None:
            beaten[rung.name] = rung.dominated_by
            continue
        better = [other for other in rungs if other.cost <= rung.cost and other.success_low > rung.success_high]
        if better:
            beaten[rung.name] = max(better, key=lambda other: other.validation_success).name
    return beaten


def beaten_by(mine: pl.DataFrame, others: Mapping[K, pl.DataFrame], confidence: float) -> K | None:
    """As `clearly_beaten`, on the games of one of them.

    Args:
        mine: a game a row, with the columns task_id, success and cost, in any one unit.
        others: by name or number, such tables of these games and perhaps of more.
    """

    def ends(rows: pl.DataFrame) -> list[float]:
        return wilson(_mean(rows["success"]), len(rows), confidence)

    found = {}
    for name, rows in others.items():
        same = _on_games_of(mine, rows)
        if _mean(same["cost"]) <= _mean(mine["cost"]) and ends(same)[0] > ends(mine)[1]:
            found[name] = _mean(same["success"])
    return max(found, key=found.__getitem__, default=None)


def _on_games_of(mine: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """The other's rows of my games, in their order."""
    return mine.select("task_id").join(other, on="task_id", how="left", maintain_order="left")


def _gain(route: Sequence[RungPlayed], check: Checked | None, played: pl.DataFrame, precisions: Precisions) -> str:
    dear, cheap = route[0], route[-1]
    won = [played.filter(rung=rung.name).sort("task_id")["success"].to_numpy() for rung in (dear, cheap)]
    low, high = paired_interval(won[0], won[1], precisions.confidence)
    gained = 100 * (dear.validation_success - cheap.validation_success)
    spent, of = dear.cost, f"the cost of {dear.name} at its success"
    if check is not None:
        spent = check.cost
        of = f"the cost of {dear.name}, {spent:.3f} where it checks {check.drafter}'s drafts, at its success"
    return (
        f"Routing can pay between {_list([_point(rung) for rung in route])}: at most {1 - cheap.cost / spent:.0%} of {of},"
        f" or {gained:.1f} points of success at the cost of {cheap.name} ({precisions.confidence:.0%} interval"
        f" {100 * low:.1f} to {100 * high:.1f}, {len(won[0])} validation games)."
    )


def _no_gain(rungs: Sequence[RungPlayed], dear: RungPlayed, check: Checked | None, precisions: Precisions) -> str:
    first, margin = rungs[0], f"{100 * precisions.margin:.0f} points"
    if nothing_to_lose(rungs, precisions.margin):
        return (
            f"Routing cannot pay: of {_list([_point(rung) for rung in rungs])} none knows the task, so there is nothing to lose"
            " by a cheap one, and none to deploy. Let the agent learn first (agent.finetune), or see whether it writes what its"
            " prompt asks for."
        )
    if dear is first:
        standing = "is the best there is"
    elif _fit([dear], precisions):
        standing = f"is at most {margin} worse than {_point(first)}"
    else:
        standing = f"wins the most, though it may be more than {margin} worse than {_point(first)}"
    saving, deploy = f"no smaller rung on the front costs {precisions.least_saving:.0%} less", dear.name
    if check is not None:
        saving += f" than its checking {check.drafter}'s drafts ({check.cost:.3f})"
        deploy += f", checking {check.drafter}'s drafts"
    return f"Routing cannot pay: {_point(dear)} {standing}, and {saving}. Deploy {deploy}."


def _point(rung: RungPlayed) -> str:
    return f"{rung.name} ({rung.validation_success:.1%} at a cost of {rung.cost:.3f})"


def _list(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _mean(values: pl.Series) -> float:
    return _rounded(values.mean())  # type: ignore[arg-type]


def _rounded(value: float) -> float:
    return round(float(value), 6)
