"""Accuracy against cost in one picture for a page, as SVG: every policy with its interval, named beside its point."""

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from dmr_pipeline.evaluation.results import Kind, Metrics, PolicyMetrics, shown_name

BLACK, BLUE, ORANGE, GREEN, PURPLE, GREY = "#000000", "#0072b2", "#d55e00", "#009e73", "#aa4499", "#777777"
"""Okabe and Ito's colours, the purple darkened, which people with a colour vision deficiency tell apart; the marks differ too."""
LOOKS: dict[Kind, tuple[str, str]] = {
    "single": (BLACK, "s"),
    "rung": (BLACK, "s"),
    "speculative": (PURPLE, "o"),
    "baseline": (PURPLE, "^"),
    "random": (GREY, "x"),
    "router": (BLUE, "*"),
    "ablation": (GREY, "X"),
    "oracle": (GREEN, "D"),
}
"""Colour and mark; the chosen router is orange."""
_PLACES = [
    (far * math.cos(math.radians(angle)), far * math.sin(math.radians(angle)), far)
    for far in (9, 18, 30, 44, 60)
    for angle in (0, 180, -90, 90, -45, 45, -135, 135)
]
"""Of a name from its point, in typographic points, and how far that is."""


def draw(metrics: Metrics, path: Path) -> None:
    """Write the picture. The same metrics give the same file, with the same matplotlib.

    Args:
        metrics: of an evaluation.
        path: of the SVG.
    """
    policies = _drawn(metrics)
    with matplotlib.rc_context({"svg.hashsalt": "dmr", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, policy in policies.items():
            colour, mark = _look(name, metrics)
            won = 100 * policy["success"]
            ends = [[won - 100 * policy["ci95"][0]], [100 * policy["ci95"][1] - won]]
            axes.errorbar(policy["cost"], won, yerr=ends, color=colour, alpha=0.25, linewidth=1)
            axes.plot(policy["cost"], won, mark, color=colour, markersize=13 if mark == "*" else 7)
        axes.set_xlabel(
            "cost of an episode: bytes that its forward passes read (1: the dearest precision's on validation games)"
        )
        axes.set_ylabel("games won, %")
        axes.set_xlim(0, 1.12 * max(policy["cost"] for policy in policies.values()))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.draw_without_rendering()
        _name_points(axes, policies, metrics)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _drawn(metrics: Metrics) -> dict[str, PolicyMetrics]:
    """All policies, a rule once that is the best beside several routers."""
    by_name = {shown_name(name, metrics): name for name in metrics["policies"]}
    return {name: metrics["policies"][name] for name in by_name.values()}


def _look(name: str, metrics: Metrics) -> tuple[str, str]:
    colour, mark = LOOKS[metrics["policies"][name]["kind"]]
    return (ORANGE if name == metrics["headline"] else colour), mark


def _name_points(axes: Axes, policies: Mapping[str, PolicyMetrics], metrics: Metrics) -> None:
    """Each name goes where it covers least of what is there (points, other names, the picture's edge) and is near; one that is
    not beside its point is joined to it by a thin line."""
    whole = axes.get_window_extent()
    taken = [_around(axes, policies[name], _look(name, metrics)[1]) for name in policies]
    for name in sorted(policies, key=lambda name: (-policies[name]["success"], policies[name]["cost"])):
        found = []
        for i, (x, y, far) in enumerate(_PLACES):
            text = _named(axes, name, metrics, x, y)
            box = text.get_window_extent()
            text.remove()
            inside = Bbox.intersection(box, whole)
            outside = _area(box) - (_area(inside) if inside is not None else 0)
            covered = sum(_area(both) for other in taken if (both := Bbox.intersection(box, other)) is not None)
            found.append((round(covered + 4 * outside + 4 * far), i, box))
        _, best, box = min(found, key=lambda place: place[:2])
        x, y, far = _PLACES[best]
        _named(axes, name, metrics, x, y, line=far > _PLACES[0][2])
        taken.append(box)


def _named(axes: Axes, name: str, metrics: Metrics, x: float, y: float, line: bool = False) -> Annotation:
    """A policy's name, so many typographic points from its own."""
    policy, colour = metrics["policies"][name], _look(name, metrics)[0]
    return axes.annotate(
        shown_name(name, metrics),
        (policy["cost"], 100 * policy["success"]),
        (x, y),
        textcoords="offset points",
        ha="center" if abs(x) < 1 else "left" if x > 0 else "right",
        va="center",
        color=colour,
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0} if line else None,
    )


def _around(axes: Axes, policy: PolicyMetrics, mark: str) -> Bbox:
    """A point's mark, in pixels."""
    x, y = axes.transData.transform((policy["cost"], 100 * policy["success"]))
    half = 9 if mark == "*" else 6
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)
