"""The report's charts as Vega-Lite specifications: plain JSON, drawn by the page's own script.

Colours are names of the page's style sheet, such as `--blue`, so that one specification serves the light and the dark scheme.
Every series has a shape or a dash of its own beside its colour. Rows have a `series`, and only those of `SELECTION` are drawn.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dmr_pipeline.evaluation.interval_text import in_percent, in_points
from dmr_pipeline.evaluation.results import STATIC, Kind, Metrics

Spec = dict[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
SELECTION = "shown"
"""The parameter that lists the series to be drawn."""
_ROUTERS = ("--blue", "--orange", "--purple", "--red")
"""In the order of the table; a random policy has the colour of the router whose ratio it plays."""
_KINDS: Mapping[Kind, tuple[str, Sequence[str]]] = {
    "single": ("--ink", ("square", "triangle-left")),
    "rung": ("--brown", ("diamond", "triangle-right", "triangle-up", "cross")),
    "speculative": ("--teal", ("cross", "wedge")),
    "random": ("--grey", ("circle",)),
    "router": ("--blue", ("circle",)),
    "ablation": ("--grey", ("wedge", "arrow")),
    "baseline": ("--grey", ("square", "diamond", "cross")),
    "oracle": ("--green", ("triangle-up",)),
}
"""Colour, and the shapes of those of the kind in their order."""
_DASHES = ([1, 0], [7, 3], [2, 2], [8, 3, 2, 3])
_SHAPES = ("circle", "triangle-down", "diamond", "triangle-up", "cross", "square", "triangle-right", "triangle-left")
_FEW_UPDATES = 60
"""Up to so many, marks can be told apart."""
_SHOWN = [{"filter": f"indexof({SELECTION}, datum.series) >= 0"}]


class Series(NamedTuple):
    """How a policy or a curve is drawn, in every chart."""

    name: str
    colour: str
    shape: str
    filled: bool = True
    dash: Sequence[int] = _DASHES[0]


def policy_series(metrics: Metrics) -> list[Series]:
    """In the order of the table. Hollow: random policies, and static ones that another one or a mixture beats."""
    routers = _routers(metrics)
    found, of_kind = [], Counter[Kind]()
    for name, policy in metrics["policies"].items():
        colour, shapes = _KINDS[policy["kind"]]
        router = name.removeprefix("random@")
        hollow = policy["kind"] == "random" or name in metrics["below_hull"]
        if router in routers:
            i = routers.index(router)
            found.append(Series(name, _cycled(_ROUTERS, i), _cycled(_SHAPES, i), not hollow, _cycled(_DASHES, i)))
        else:
            found.append(Series(name, colour, _cycled(shapes, of_kind[policy["kind"]]), not hollow))
            of_kind[policy["kind"]] += 1
    return found


def few(metrics: Metrics) -> list[str]:
    """What a reader compares first: both ends, the routers, and the best static policy that costs no more than the chosen
    one."""
    policies = metrics["policies"]
    budget = policies[metrics["headline"]]["cost"]
    within = [name for name, p in policies.items() if p["kind"] in STATIC and p["cost"] <= budget]
    best = max(within, key=lambda name: policies[name]["success"], default=metrics["high"])
    return [
        name
        for name, policy in policies.items()
        if name in (metrics["high"], metrics["low"], best) or policy["kind"] == "router"
    ]


def curve_series(metrics: Metrics) -> list[Series]:
    """Routers, and the rules that they are compared with, have colours; the others are grey."""
    routers, chosen = _routers(metrics), {best["rule"] for best in metrics.get("best_rules", {}).values()}
    found = []
    for i, name in enumerate(metrics.get("curves", {})):
        colour = (
            _cycled(_ROUTERS, routers.index(name)) if name in routers else "--green" if name in chosen else "--grey"
        )
        found.append(Series(name, colour, _cycled(_SHAPES, i), True, _cycled(_DASHES, i)))
    return found


def few_curves(metrics: Metrics) -> list[str]:
    chosen = {best["rule"] for best in metrics.get("best_rules", {}).values()}
    return [name for name, curve in metrics.get("curves", {}).items() if curve["kind"] == "router" or name in chosen]


def plane(metrics: Metrics, by: str) -> Spec:
    """Success against cost or spend, all policies, with intervals.

    Args:
        by: `cost` or `spend`. The reference line: by cost the hull of static policies, level past the best of them; by spend
            the mixtures of high and low.
    """
    policies, series = metrics["policies"], policy_series(metrics)
    rows: list[Spec] = [
        {
            "series": name,
            "success": policy["success"],
            "from": policy["ci95"][0],
            "to": policy["ci95"][1],
            "interval": in_percent(policy["ci95"]),
            "cost": policy["cost"],
            "cost_from": policy["cost_ci95"][0],
            "cost_to": policy["cost_ci95"][1],
            "cost_interval": "{:.3f} to {:.3f}".format(*policy["cost_ci95"]),
            "spend": policy["spend"],
            "gain": f"{policy['gain_at_equal_cost'] * 100:+.1f} points ({in_points(policy['gain_ci95'])})",
            "switches": policy["switches"],
        }
        for name, policy in policies.items()
    ]
    if by == "cost":
        dearest = max(row["cost"] for row in rows)
        line = [(point["cost"], point["success"]) for point in metrics["hull"]]
        line.append((max(dearest, line[-1][0]), line[-1][1]))
    else:
        line = [(0.0, policies[metrics["low"]]["success"]), (1.0, policies[metrics["high"]]["success"])]
    x = _spent(metrics, by)
    told = {
        "series": "policy", "success": "success", "interval": "interval", "cost": "cost", "cost_interval": "interval of cost",
        "spend": spend_title(metrics), "gain": "gain at equal cost", "switches": "switches an episode",
    }  # fmt: skip
    layers = [_reference(line, x, by == "cost"), _whiskers(x, series)]
    if by == "cost":
        ends = {"x": x | {"field": "cost_from"}, "x2": {"field": "cost_to"}, "y": _success(), "color": _colour(series)}
        layers.append(
            {"transform": _SHOWN, "mark": {"type": "rule", "strokeWidth": 1, "opacity": 0.4}, "encoding": ends}
        )
    layers.append(_marks(x, _success(), series, told))
    return _chart(
        rows, layers, [s.name for s in series], f"Success against {x['title']}, a mark a policy, with intervals"
    )


def curves(metrics: Metrics, by: str) -> Spec:
    """Routers and rules at all budgets, with the reference line of `plane`."""
    series, policies = curve_series(metrics), metrics["policies"]
    rows: list[Spec] = [
        {
            "series": name,
            "budget": point["budget"],
            "success": point["success"],
            "from": point["ci95"][0],
            "to": point["ci95"][1],
            "interval": in_percent(point["ci95"]),
            "cost": point["cost"],
            "spend": point["spend"],
            "gain": f"{point['gain_at_equal_cost'] * 100:+.1f} points ({in_points(point['gain_ci95'])})",
        }
        for name, curve in metrics.get("curves", {}).items()
        for point in curve["points"]
    ]
    if by == "cost":
        line = [(point["cost"], point["success"]) for point in metrics["hull"]]
        line.append((max(line[-1][0], *(row["cost"] for row in rows)), line[-1][1]))
    else:
        line = [(0.0, policies[metrics["low"]]["success"]), (1.0, policies[metrics["high"]]["success"])]
    x = _spent(metrics, by)
    told = {
        "series": "curve", "budget": "budget", "success": "success", "interval": "interval", "cost": "cost",
        "spend": spend_title(metrics), "gain": "gain at equal cost",
    }  # fmt: skip
    joined: Spec = {
        "transform": _SHOWN,
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {
            "x": x,
            "y": _success(),
            "order": {"field": "spend"},
            "color": _colour(series),
            "strokeDash": _dash(series),
        },
    }
    layers = [_reference(line, x, by == "cost"), joined, _whiskers(x, series), _marks(x, _success(), series, told)]
    return _chart(rows, layers, few_curves(metrics), f"Success against {x['title']}, a line a router or rule")


def by_task_type(metrics: Metrics) -> Spec:
    """Success with intervals, a row a task type and policy."""
    series = policy_series(metrics)
    rows: list[Spec] = [
        {
            "series": name,
            "task type": _lines(task_type),
            "success": of_type["success"],
            "from": of_type["ci95"][0],
            "to": of_type["ci95"][1],
            "interval": in_percent(of_type["ci95"]),
            "games": of_type["n"],
        }
        for name, policy in metrics["policies"].items()
        for task_type, of_type in policy["by_task_type"].items()
    ]
    told = {
        "series": "policy",
        "task type": "task type",
        "success": "success",
        "interval": "interval",
        "games": "games",
    }
    return _rows_chart(
        rows, series, few(metrics), told, "Success by task type, a mark a policy, with intervals", "success"
    )


def asked_by_task_type(metrics: Metrics) -> Spec:
    """Share of the steps in high precision, a row a task type and router."""
    series = [s for s in policy_series(metrics) if s.name in _routers(metrics)]
    rows: list[Spec] = [
        {
            "series": s.name,
            "task type": _lines(task_type),
            "ratio": of_type["high_ratio"],
            "games": of_type["n"],
        }
        for s in series
        for task_type, of_type in metrics["policies"][s.name]["by_task_type"].items()
    ]
    told = {"series": "router", "task type": "task type", "ratio": "high-precision steps", "games": "games"}
    title = "Share of the steps in high precision by task type, a mark a router"
    return _rows_chart(rows, series, [s.name for s in series], told, title, "ratio")


def asked_by_turn(metrics: Metrics, turns: Sequence[Spec]) -> Spec:
    """Share of the steps in high precision at each turn, and, behind it, of the games that still run.

    Args:
        turns: rows of `viewer.turns`.
    """
    series = [s for s in policy_series(metrics) if s.name in _routers(metrics)]
    x = {"field": "turn", "type": "quantitative", "title": "turn", "axis": {"tickMinStep": 1}}
    x["scale"] = {"nice": False, "zero": False, "padding": 6}
    y = {
        "field": "ratio",
        "type": "quantitative",
        "title": "share",
        "axis": {"format": ".0%"},
        "scale": {"domain": [0, 1]},
    }
    told = {
        "series": "router",
        "turn": "turn",
        "ratio": "high-precision steps",
        "probability": "mean probability",
        "steps": "steps",
    }
    behind: Spec = {
        "transform": [*_SHOWN, {"filter": {"field": "series", "equal": metrics["headline"]}}],
        "mark": {"type": "bar", "color": "--line", "width": 5},
        "encoding": {"x": x, "y": y | {"field": "running"}},
    }
    joined: Spec = {
        "transform": _SHOWN,
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {"x": x, "y": y, "color": _colour(series), "strokeDash": _dash(series)},
    }
    title = "Share of the steps in high precision at each turn, a line a router; bars: games that still run"
    return _chart(turns, [behind, joined, _marks(x, y, series, told, 45)], [s.name for s in series], title, 280)


def training(figures: Mapping[str, Any]) -> dict[str, Spec]:
    """Title -> chart, a quantity each."""
    of_grpo: list[Spec] = figures["grpo_training"]
    found = {"Stage 1: cross-entropy": _log(figures["kl_training"], {"loss": "training"}, "loss")}
    for title, columns, axis in (
        ("Stage 2: success", {"success": "training", "validation_success": "validation"}, "success"),
        ("Stage 2: reward", {"reward": "training", "validation_reward": "validation"}, "reward"),
        ("Stage 2: cost", {"cost": "training", "validation_cost": "validation"}, "cost"),
        ("Stage 2: high-precision ratio", {"ratio": "training", "validation_ratio": "validation"}, "ratio"),
        ("Stage 2: tied groups", {"tied_groups": "training"}, "share"),
        ("Stage 2: KL to stage 1", {"divergence": "training"}, "nats"),
    ):
        found[title] = _log(of_grpo, columns, axis)
    return {title: spec for title, spec in found.items() if spec["data"]["values"]}


def _log(rows: Sequence[Spec], columns: Mapping[str, str], axis: str) -> Spec:
    """Columns of a training's log over the updates, each under a name."""
    values = [
        {"series": name, "update": row["update"], "value": row[column]}
        for column, name in columns.items()
        for row in rows
        if row.get(column) is not None
    ]
    series = [Series("training", "--orange", "circle"), Series("validation", "--ink", "diamond", True, _DASHES[1])]
    x = {"field": "update", "type": "quantitative", "title": "update", "axis": {"tickMinStep": 1, "tickCount": 5}}
    y = {"field": "value", "type": "quantitative", "title": axis, "scale": {"zero": False}, "axis": {"tickCount": 5}}
    line: Spec = {
        "mark": {"type": "line", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": y, "color": _colour(series), "strokeDash": _dash(series)},
    }
    told = {"series": "of", "update": "update", "value": axis}
    marks = [_marks(x, y, series, told, 30)] if len(rows) <= _FEW_UPDATES else []
    return _chart(values, [line, *marks], [s.name for s in series], f"{axis} over the updates", 170)


def calibration(figures: Mapping[str, Any]) -> Spec:
    """Observed share of sensitive steps against the predicted probability."""
    rows = [
        row | {"series": "router", "interval": in_percent([row["lower"], row["upper"]])}
        for row in figures["calibration"]
    ]
    end = min(1.0, 1.08 * max((max(row["upper"], row["predicted"]) for row in rows), default=1.0))
    axis = {"scale": {"domain": [0, end], "nice": False}, "axis": {"format": ".0%"}, "type": "quantitative"}
    x = axis | {"field": "predicted", "title": "predicted probability of sensitive"}
    y = axis | {"field": "observed", "title": "observed share of sensitive"}
    series = [Series("router", "--blue", "circle")]
    ideal: Spec = {
        "data": {"values": [{"predicted": 0, "observed": 0}, {"predicted": end, "observed": end}]},
        "mark": {"type": "line", "color": "--muted", "strokeDash": [4, 3]},
        "encoding": {"x": x, "y": y},
    }
    ends: Spec = {
        "mark": {"type": "rule", "color": "--blue", "opacity": 0.6},
        "encoding": {"x": x, "y": y | {"field": "lower"}, "y2": {"field": "upper"}},
    }
    told = {"predicted": "predicted", "observed": "observed", "interval": "95% interval", "steps": "steps"}
    return _chart(
        rows, [ideal, ends, _marks(x, y, series, told, 60)], ["router"], "Observed against predicted sensitivity", 300
    )


def kl_by_turn(figures: Mapping[str, Any]) -> Spec:
    """How far the precisions' action distributions are apart as an episode goes on, in the labelled trajectories."""
    rows = [row | {"series": "median"} for row in figures["kl_by_turn"]]
    x = {"field": "turn", "type": "quantitative", "title": "turn", "axis": {"tickMinStep": 1}}
    x["scale"] = {"nice": False, "zero": False, "padding": 6}
    y = {"type": "quantitative", "title": "KL(high || low), nats", "scale": {"type": "log"}, "axis": {"format": "~g"}}
    spread: Spec = {
        "mark": {"type": "area", "color": "--blue", "opacity": 0.2},
        "encoding": {"x": x, "y": y | {"field": "lower"}, "y2": {"field": "upper"}},
    }
    series = [Series("median", "--blue", "circle")]
    told = {
        "turn": "turn",
        "median": "median",
        "lower": "tenth",
        "upper": "nine tenths",
        "sensitive": "sensitive",
        "steps": "steps",
    }
    line: Spec = {"mark": {"type": "line", "color": "--blue"}, "encoding": {"x": x, "y": y | {"field": "median"}}}
    marks = _marks(x, y | {"field": "median"}, series, told, 40)
    return _chart(rows, [spread, line, marks], ["median"], "KL divergence of the labelled steps at each turn", 300)


def _chart(
    rows: Sequence[Spec], layers: Sequence[Spec], shown: Sequence[str], description: str, height: int = 340
) -> Spec:
    return {
        "$schema": SCHEMA,
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "params": [{"name": SELECTION, "value": [*shown]}],
        "data": {"values": [*rows]},
        "layer": [*layers],
    }


def _rows_chart(
    rows: Sequence[Spec],
    series: Sequence[Series],
    shown: Sequence[str],
    told: Mapping[str, str],
    title: str,
    field: str,
) -> Spec:
    """A band a task type, and in it a line a series."""
    types = list(dict.fromkeys(row["task type"] for row in rows))
    y = {
        "field": "task type",
        "type": "nominal",
        "title": None,
        "sort": types,
        "axis": {"labelLimit": 150, "grid": True},
    }
    x = {"field": field, "type": "quantitative", "title": title.partition(" by ")[0].lower(), "axis": {"format": ".0%"}}
    x["scale"] = {"domain": [0, 1]}
    offset = {"field": "series", "sort": [s.name for s in series]}
    marks = _marks(x, y, series, told, 70)
    marks["encoding"]["yOffset"] = offset
    layers = [marks]
    if rows and "from" in rows[0]:
        ends = {"x": x | {"field": "from"}, "x2": {"field": "to"}, "y": y, "yOffset": offset, "color": _colour(series)}
        layers.insert(0, {"transform": _SHOWN, "mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": ends})
    return _chart(rows, layers, shown, title, 60 * len(types) + 40)


def _marks(x: Spec, y: Spec, series: Sequence[Series], told: Mapping[str, str], size: int = 110) -> Spec:
    formats = {
        "success": ".1%", "spend": ".1%", "cost": ".3f", "ratio": ".1%", "probability": ".3f", "switches": ".1f", "value": ".4~g",
        "predicted": ".1%", "observed": ".1%", "sensitive": ".1%", "median": ".3~g", "lower": ".3~g", "upper": ".3~g",
    }  # fmt: skip
    tips = [
        {"field": field, "title": title} | ({"format": formats[field]} if field in formats else {})
        for field, title in told.items()
    ]
    filled = [s.colour if s.filled else "--card" for s in series]
    return {
        "transform": _SHOWN,
        "mark": {"type": "point", "size": size, "strokeWidth": 2, "opacity": 1},
        "encoding": {
            "x": x,
            "y": y,
            "stroke": _colour(series),
            "fill": _by_series(series, filled),
            "shape": _by_series(series, [s.shape for s in series]),
            "tooltip": tips,
        },
    }


def _whiskers(x: Spec, series: Sequence[Series]) -> Spec:
    ends = {"x": x, "y": _success() | {"field": "from"}, "y2": {"field": "to"}, "color": _colour(series)}
    return {"transform": _SHOWN, "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6}, "encoding": ends}


def _reference(line: Sequence[tuple[float, float]], x: Spec, solid: bool) -> Spec:
    return {
        "data": {"values": [{x["field"]: at, "success": success} for at, success in line]},
        "mark": {"type": "line", "color": "--muted", "strokeWidth": 2, "strokeDash": [1, 0] if solid else [4, 3]},
        "encoding": {"x": x, "y": _success()},
    }


def _success() -> Spec:
    return {
        "field": "success",
        "type": "quantitative",
        "title": "success",
        "axis": {"format": ".0%"},
        "scale": {"zero": False},
    }


def _spent(metrics: Metrics, by: str) -> Spec:
    """The horizontal axis."""
    if by == "cost":
        return {
            "field": "cost",
            "type": "quantitative",
            "title": "cost of an episode",
            "scale": {"zero": True},
            "axis": {"format": ".1f", "tickCount": 6},
        }
    return {
        "field": "spend",
        "type": "quantitative",
        "title": spend_title(metrics),
        "scale": {"domain": [0, 1]},
        "axis": {"format": ".0%", "tickCount": 6},
    }


def spend_title(metrics: Metrics) -> str:
    return "steps in high precision" if len(metrics["route"]) == 2 else "spend: cheapest precision 0%, dearest 100%"


def _by_series(series: Sequence[Series], values: Sequence[Any]) -> Spec:
    scale = {"domain": [s.name for s in series], "range": [*values]}
    return {"field": "series", "type": "nominal", "scale": scale, "legend": None}


def _colour(series: Sequence[Series]) -> Spec:
    return _by_series(series, [s.colour for s in series])


def _dash(series: Sequence[Series]) -> Spec:
    return _by_series(series, [s.dash for s in series])


def _routers(metrics: Metrics) -> list[str]:
    return [name for name, policy in metrics["policies"].items() if policy["kind"] == "router"]


def _cycled(values: Sequence[Any], i: int) -> Any:  # noqa: ANN401 - whatever they are
    return values[i % len(values)]


def _lines(task_type: str) -> str:
    """In short lines, for the axis."""
    return textwrap.fill(task_type.replace("_", " "), 18)
