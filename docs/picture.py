"""The README's picture, accuracy against cost: drawn from the committed table in docs/results/alfworld-tiny.md.

python docs/picture.py
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "alfworld-tiny.md"
PICTURE = RESULTS / "alfworld-tiny.svg"

BLACK, BLUE, ORANGE, GREEN, PURPLE, GREY = "#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#777777"
"""Okabe and Ito's colours, which people with a colour vision deficiency tell apart; the markers differ too."""


class Point(NamedTuple):
    policy: str
    success: float
    low: float
    high: float
    """In percent; low and high are the ends of the 95% interval."""
    cost: float


class Look(NamedTuple):
    text: str
    color: str
    marker: str
    offset: tuple[int, int]
    """Of the text from the point, in typographic points."""
    align: str = "left"


LOOKS = {
    "always_high": Look("float alone", BLACK, "s", (8, 2)),
    "always_low": Look("int2 alone", BLACK, "s", (9, -3)),
    "always_int2-mse": Look("int2-mse alone", BLACK, "s", (-2, -22)),
    "always_int4": Look("int4 alone", BLACK, "s", (-8, 7), "right"),
    "always_int8": Look("int8 alone", BLACK, "s", (7, 2)),
    "speculative:float<int2": Look("int2 drafts, float checks", PURPLE, "o", (4, 10)),
    "confidence": Look("confidence cascade", PURPLE, "^", (-9, -3), "right"),
    "random@grpo_router": Look("random, as often as the routers", GREY, "x", (8, 0)),
    "random@kl_router": Look("", GREY, "x", (0, 0)),
    "grpo_router": Look("router, stage 2 (GRPO)", BLUE, "*", (10, 0)),
    "kl_router": Look("router, stage 1 (KL), the chosen one", ORANGE, "*", (10, -8)),
    "disagreement": Look("oracle", GREEN, "D", (-3, -17)),
}


def points(page: str) -> list[Point]:
    """The rows of the page's first table.

    Raises:
        ValueError: there is none with these columns.
    """
    row = r"^\| \**([^ |*]+)\** \| ([\d.]+)% \[([\d.]+), ([\d.]+)\] \| [\d.]+% \| ([\d.]+) \("
    found = [Point(name, *map(float, rest)) for name, *rest in re.findall(row, page.partition("\n\n**")[0], re.M)]
    if not found:
        raise ValueError(f"{TABLE} has no table of policies with their costs")
    return found


def draw(found: list[Point], path: Path) -> None:
    """The same points give the same file, with the same matplotlib."""
    style = {"svg.hashsalt": "dmr", "svg.fonttype": "path", "font.size": 10}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8.4, 4.4), layout="constrained")
        for point in found:
            look = LOOKS[point.policy]
            interval = [[point.success - point.low], [point.high - point.success]]
            axes.errorbar(point.cost, point.success, yerr=interval, color=look.color, alpha=0.25, linewidth=1)
            size = 13 if look.marker == "*" else 7
            axes.plot(point.cost, point.success, look.marker, color=look.color, markersize=size)
            place = {"xytext": look.offset, "textcoords": "offset points", "ha": look.align}
            axes.annotate(look.text, (point.cost, point.success), color=look.color, **place)
        axes.set_xlabel(
            "cost of an episode: bytes that its forward passes read (1: the float agent's on validation games)"
        )
        axes.set_ylabel("games won, %")
        axes.set_xlim(0.3, 1.6)
        axes.set_ylim(50, 100)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


if __name__ == "__main__":
    draw(points(TABLE.read_text(encoding="utf-8")), Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
