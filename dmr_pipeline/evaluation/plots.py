"""The report's pictures: PNG files whose bytes depend on the data alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dmr_pipeline.evaluation.figures import KL_FLOOR, calibration_bins, turns
from dmr_pipeline.evaluation.results import Metrics, PolicyMetrics
from dmr_pipeline.precision.hull import Floats

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
BLUE, ORANGE, GREEN, BROWN, TEAL, GREY = "#1d5fd1", "#d9580d", "#1b8a5a", "#7a4a12", "#0b7d8c", "#7b8794"
_ROUTER_COLOURS = (BLUE, ORANGE, "#8d35b5", "#b3261e")
"""Routers in the order of the table; a random policy has the colour of the router whose ratio it plays."""

_LABEL = 0.391
"""Inches of a figure's height that a policy's name needs beside the picture."""

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": 150,
    "font.size": 10,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def plot_accuracy_cost(metrics: Metrics, path: Path) -> None:
    """Success against high-precision ratio and against cost, with intervals.

    Over the ratio the dashed line joins always-low and always-high: what playing whole episodes in one or the other at random
    reaches. Over the cost the solid line is the hull of all single rungs, level and dotted past the best of them.
    """
    policies = metrics["policies"]
    high, low = policies[metrics["high"]], policies[metrics["low"]]
    colours = _colours(policies)
    with _figure(path, 10.5, max(4.6, _LABEL * len(policies))) as figure:
        by_ratio, by_cost = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1, 1]})
        figure.subplots_adjust(left=0.07, right=0.74, bottom=0.13, top=0.91, wspace=0.08)
        by_ratio.plot([0, 1], [low["success"], high["success"]], "--", color=GREY, linewidth=1.2, zorder=1)
        dearest = max(policy["cost"] for policy in policies.values())
        corners = [(point["cost"], point["success"]) for point in metrics["hull"]]
        by_cost.plot(*zip(*corners, strict=True), "-", color=MUTED, linewidth=2, zorder=1)
        best = corners[-1][1]
        by_cost.plot([corners[-1][0], dearest * 1.08], [best, best], ":", color=MUTED, linewidth=2, zorder=1)
        for axes, key in ((by_ratio, "spend"), (by_cost, "cost")):
            for name, policy in policies.items():
                hollow = policy["kind"] == "random" or name in metrics["below_hull"]
                _point(axes, _coordinate(policy, key), policy, colours[name], hollow)
        two = len(metrics["route"]) == 2
        spent = "steps in high precision" if two else "spend: cheapest rung 0%, dearest 100%"
        by_ratio.set(title="By ratio" if two else "By spend", xlabel=spent, ylabel="success", xlim=(-0.05, 1.05))
        by_ratio.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        by_ratio.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        by_cost.set(title="By cost", xlabel="cost of an episode (dearest precision on validation = 1)")
        by_cost.set_xlim(0, dearest * 1.08)
        bottom = min(policy["ci95"][0] for policy in policies.values())
        top = max(policy["ci95"][1] for policy in policies.values())
        margin = 0.06 * max(top - bottom, 0.05)
        by_cost.set_ylim(bottom - margin, top + margin)
        _label_beside(figure, by_cost, policies, colours)


def plot_curves(metrics: Metrics, path: Path) -> None:
    """Success of each router and rule at all budgets, against high-precision ratio and against cost.

    Routers and the rules that they are compared with have bands, of the points' intervals; other rules are thin lines. The
    references are those of `plot_accuracy_cost`.
    """
    policies, curves = metrics["policies"], metrics["curves"]
    high, low = policies[metrics["high"]], policies[metrics["low"]]
    chosen = {best["rule"] for best in metrics.get("best_rules", {}).values()}
    routers = [name for name, curve in curves.items() if curve["kind"] == "router"]
    colours = {name: _ROUTER_COLOURS[i % len(_ROUTER_COLOURS)] for i, name in enumerate(routers)}
    colours |= {name: (GREEN, TEAL)[i % 2] for i, name in enumerate(sorted(chosen))}
    others = [name for name in curves if name not in colours]
    points = [point for curve in curves.values() for point in curve["points"]]
    with _figure(path, 10.5, 5.4) as figure:
        by_ratio, by_cost = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(left=0.07, right=0.8, bottom=0.12, top=0.92, wspace=0.08)
        by_ratio.plot([0, 1], [low["success"], high["success"]], "--", color=GREY, linewidth=1.2, zorder=1)
        dearest = max(point["cost"] for point in points)
        corners = [(point["cost"], point["success"]) for point in metrics["hull"]]
        corners += [(max(dearest * 1.05, corners[-1][0]), corners[-1][1])]
        by_cost.plot(*zip(*corners, strict=True), "-", color=INK, linewidth=2, zorder=1, label="static policies")
        for axes, by_spend in ((by_ratio, True), (by_cost, False)):
            for name in [*others, *colours]:
                line = sorted(curves[name]["points"], key=lambda p: p["spend"])
                x = [point["spend" if by_spend else "cost"] for point in line]
                y = [point["success"] for point in line]
                if name in colours:
                    ends = np.array([point["ci95"] for point in line]).T
                    order = np.argsort(x)
                    axes.fill_between(
                        np.array(x)[order], ends[0][order], ends[1][order], color=colours[name], alpha=0.13, lw=0
                    )
                    axes.plot(x, y, "o-", color=colours[name], linewidth=2, ms=5, zorder=4, label=name)
                else:
                    i = others.index(name)
                    style, marker = ("-", "--", ":")[i % 3], "svD^x+1*"[i % 8]
                    axes.plot(x, y, style, marker=marker, color=GREY, linewidth=1, ms=4, zorder=2, label=name)
        two = len(metrics["route"]) == 2
        spent = "steps in high precision" if two else "spend: cheapest rung 0%, dearest 100%"
        by_ratio.set(title="By ratio" if two else "By spend", xlabel=spent, ylabel="success")
        by_ratio.set_xlim(0, 1.08 * max(point["spend"] for point in points) + 1e-9)
        by_ratio.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        by_ratio.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        by_cost.set(title="By cost", xlabel="cost of an episode (dearest precision on validation = 1)")
        by_cost.set_xlim(0, dearest * 1.05)
        handles, names = by_cost.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(0.805, 0.52))


def plot_kl_by_turn(sensitivity: pl.DataFrame, path: Path) -> None:
    """How far the two action distributions are apart at each turn, and the share of its steps labelled sensitive.

    Args:
        sensitivity: columns turn (from 0), kl_high_low (nats), sensitive (bool); a row a step and cheaper rung.
        path: of the PNG.
    """
    by_turn = turns(sensitivity)
    turn = by_turn["turn"].to_numpy()
    with _figure(path, 8.4, 4.8) as figure:
        axes, count = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1]})
        figure.subplots_adjust(left=0.1, right=0.9, bottom=0.11, top=0.93, hspace=0.12)
        axes.fill_between(
            turn, by_turn["lower"], by_turn["upper"], color=BLUE, alpha=0.16, lw=0, label="10% to 90% of steps"
        )
        axes.plot(turn, by_turn["median"], color=BLUE, marker="o", markersize=3.5, label="median")
        axes.set_yscale("log")
        axes.set(title="KL(high || low) by turn", ylabel=f"nats (floor {KL_FLOOR:g})")
        axes.legend(loc="lower right")
        count.bar(turn, by_turn["steps"], width=0.8, color="#cbd2d9")
        count.set(xlabel="turn", ylabel="steps", xlim=(turn.min() - 0.6, turn.max() + 0.6))
        share = count.twinx()
        share.plot(turn, by_turn["sensitive"], color=ORANGE, marker="o", markersize=3)
        share.set_ylim(0, max(0.05, float(by_turn["sensitive"].to_numpy().max()) * 1.15))
        share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        share.set_ylabel("sensitive", color=ORANGE)
        share.grid(visible=False)
        share.spines["right"].set_visible(True)


def plot_training_curves(kl_log: pl.DataFrame, grpo_log: pl.DataFrame, path: Path) -> None:
    """Both stages' training, one panel a quantity.

    Args:
        kl_log: columns update, loss.
        grpo_log: columns update, reward, ratio, success, tied_groups (share), divergence (from stage 1, nats) and
            validation_success, validation_cost, null where nothing was validated.
        path: of the PNG.
    """
    with _figure(path, 10.5, 5.4) as figure:
        (loss, success, ratio), (reward, tied, divergence) = figure.subplots(2, 3)
        figure.subplots_adjust(left=0.06, right=0.985, bottom=0.1, top=0.94, wspace=0.24, hspace=0.42)
        loss.plot(kl_log["update"], kl_log["loss"], color=BLUE, linewidth=0.6, alpha=0.3)
        window = max(1, len(kl_log) // 20)
        smooth = kl_log.with_columns(pl.col("loss").rolling_mean(window, min_samples=1))
        _curve(loss, smooth, "loss", BLUE, "Stage 1: cross-entropy")
        validated = grpo_log.drop_nulls(["validation_success", "validation_cost"])
        _curve(success, grpo_log, "success", ORANGE, "Stage 2: success", "training", share=True)
        success.plot(validated["update"], validated["validation_success"], "o", color=INK, ms=4, label="validation")
        _curve(ratio, grpo_log, "ratio", ORANGE, "Stage 2: ratio and cost", "high-precision ratio")
        ratio.plot(validated["update"], validated["validation_cost"], "o", color=INK, ms=4, label="validation cost")
        ratio.set_ylim(0, 1.05 * ratio.dataLim.y1)
        _curve(reward, grpo_log, "reward", ORANGE, "Stage 2: reward")
        _curve(tied, grpo_log, "tied_groups", ORANGE, "Stage 2: tied groups", share=True)
        tied.set_ylim(0, 1.02)
        _curve(divergence, grpo_log, "divergence", ORANGE, "Stage 2: KL to stage 1 (nats)")
        for axes in (success, ratio):
            axes.legend(loc="best")
        for axes in (loss, success, ratio, reward, tied, divergence):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axes in (reward, tied, divergence, loss):
            axes.set_xlabel("update")


def plot_calibration(probabilities: Floats, labels: Floats, path: Path, bins: int = 10) -> None:
    """Share of sensitive steps against predicted probability, in bins of equal count, with 95% Wilson intervals.

    Args:
        probabilities: predicted, [steps].
        labels: 0 or 1, [steps].
        path: of the PNG.
        bins: groups of steps with neighbouring probabilities.
    """
    binned = calibration_bins(probabilities, labels, bins)
    predicted, observed = binned["predicted"].to_numpy(), binned["observed"].to_numpy()
    intervals = binned.select("lower", "upper").to_numpy()
    end = min(1.0, 1.08 * max(float(probabilities.max()), float(intervals.max())))  # sensitive steps may be rare
    with _figure(path, 5.6, 5.2) as figure:
        axes, count = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.2, 1]})
        figure.subplots_adjust(left=0.14, right=0.96, bottom=0.11, top=0.93, hspace=0.12)
        axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1.2, label="perfect")
        errors = np.abs(intervals.T - observed)
        axes.errorbar(predicted, observed, errors, fmt="o-", color=BLUE, ms=5, lw=1.2, capsize=2, label="router")
        axes.set(
            title="Calibration on held-out steps", ylabel="observed share of sensitive", ylim=(-0.03 * end, 1.03 * end)
        )
        axes.legend(loc="upper left")
        count.hist(probabilities, bins=25, range=(0, end), color="#cbd2d9")
        count.set(xlabel="predicted probability of sensitive", ylabel="steps", xlim=(-0.02 * end, 1.02 * end))


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in inches, written to `path` at the end; no pyplot, so no global state and no display."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})  # matplotlib's version would change the hash


def _colours(policies: Mapping[str, PolicyMetrics]) -> dict[str, str]:
    routers = [name for name, policy in policies.items() if policy["kind"] == "router"]
    colours = {name: _ROUTER_COLOURS[i % len(_ROUTER_COLOURS)] for i, name in enumerate(routers)}
    by_kind = {
        "single": INK,
        "rung": BROWN,
        "speculative": TEAL,
        "oracle": GREEN,
        "baseline": GREY,
        "random": GREY,
        "ablation": GREY,
    }
    return {
        name: colours.get(name.removeprefix("random@")) or by_kind[policy["kind"]] for name, policy in policies.items()
    }


def _coordinate(policy: PolicyMetrics, key: str) -> float:
    return policy["cost"] if key == "cost" else policy["spend"]


def _point(axes: Axes, x: float, policy: PolicyMetrics, colour: str, hollow: bool) -> None:
    """Filled for what decides and for single rungs on the hull, hollow for random and for single rungs below the hull."""
    markers = {
        "single": "s",
        "rung": "s",
        "speculative": "P",
        "random": "o",
        "router": "o",
        "ablation": "X",
        "baseline": "D",
        "oracle": "^",
    }
    marker = markers[policy["kind"]]
    errors = [[policy["success"] - policy["ci95"][0]], [policy["ci95"][1] - policy["success"]]]
    face = "white" if hollow else colour
    axes.errorbar(
        x, policy["success"], errors, fmt=marker, color=colour, mfc=face, mew=1.5, ms=7, lw=1.2, capsize=2.5, zorder=3
    )


def _label_beside(
    figure: Figure, axes: Axes, policies: Mapping[str, PolicyMetrics], colours: Mapping[str, str]
) -> None:
    """Names in a column to the right, spread so that none overlaps, each joined to its point by a thin line."""
    bottom, top = axes.get_ylim()
    names = sorted(policies, key=lambda name: (policies[name]["success"], -policies[name]["cost"], name))
    wanted = [(policies[name]["success"] - bottom) / (top - bottom) for name in names]
    right = axes.get_xlim()[1]
    for name, height in zip(names, _spread(wanted, _LABEL / figure.get_figheight()), strict=True):
        policy = policies[name]
        axes.annotate(
            f"{name}  {policy['success']:.1%}",
            xy=(policy["cost"], policy["success"]),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            color=colours[name],
            fontsize=9.5,
            annotation_clip=False,
        )
        label_y = bottom + height * (top - bottom)
        axes.plot(
            [policy["cost"], right * 1.02],
            [policy["success"], label_y],
            color=colours[name],
            linewidth=0.6,
            alpha=0.55,
            clip_on=False,
            zorder=2,
        )
    axes.set(xlim=(0, right), ylim=(bottom, top))


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights in [0, 1] near the wanted ones (ascending), at least `gap` apart as long as they fit."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights


def _curve(
    axes: Axes,
    log: pl.DataFrame,
    column: str,
    colour: str,
    title: str,
    label: str | None = None,
    *,
    share: bool = False,
) -> None:
    axes.plot(log["update"], log[column], color=colour, linewidth=1.4, label=label)
    axes.set_title(title)
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
