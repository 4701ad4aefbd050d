"""Accuracy against cost in one picture for a page, as SVG: every policy with its interval, named beside its point."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from dmr_pipeline.evaluation.pages import shown_name
from dmr_pipeline.evaluation.results import Kind, Metrics, PolicyMetrics

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
_PLACES = [(9, 0, "left"), (-9, 0, "right"), (0, 9, "center"), (0, -9, "center")]
_PLACES += [(7 * x, 8 * y, "left" if x > 0 else "right") for y in (-1, 1, -2, 2) for x in (1, -1)]
"""Of a name from its point, in typographic points, the first ones preferred; and how it is aligned."""


def draw(metrics: Metrics, path: Path) -> None:
    """Write the picture. The same metrics give the same file, with the same matplotlib.

    Args:
        metrics: of an evaluation.
        path: of the SVG.
    """
    policies = metrics["policies"]
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
        _name_points(axes, metrics)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _look(name: str, metrics: Metrics) -> tuple[str, str]:
    colour, mark = LOOKS[metrics["policies"][name]["kind"]]
    return (ORANGE if name == metrics["headline"] else colour), mark


def _name_points(axes: Axes, metrics: Metrics) -> None:
    """Each name goes to the first place where it covers least of what is there: points, other names, the picture's edge."""
    policies = metrics["policies"]
    whole = axes.get_window_extent()
    taken = [_around(axes, policy) for policy in policies.values()]
    for name in sorted(policies, key=lambda name: (-policies[name]["success"], policies[name]["cost"])):
        policy = policies[name]
        placed: list[tuple[float, Annotation]] = []
        for x, y, align in _PLACES:
            text = axes.annotate(
                shown_name(name, metrics),
                (policy["cost"], 100 * policy["success"]),
                (x, y),
                textcoords="offset points",
                ha=align,
                va="center",
                color=_look(name, metrics)[0],
            )
            box = text.get_window_extent()
            inside = Bbox.intersection(box, whole)
            outside = _area(box) - (_area(inside) if inside is not None else 0)
            covered = sum(_area(both) for other in taken if (both := Bbox.intersection(box, other)) is not None)
            placed.append((covered + outside, text))
        best = min(range(len(placed)), key=lambda i: (round(placed[i][0]), i))
        for i, (_, text) in enumerate(placed):
            if i != best:
                text.remove()
        taken.append(placed[best][1].get_window_extent())


def _around(axes: Axes, policy: PolicyMetrics) -> Bbox:
    """A point's mark, in pixels."""
    x, y = axes.transData.transform((policy["cost"], 100 * policy["success"]))
    return Bbox.from_extents(x - 6, y - 6, x + 6, y + 6)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)
