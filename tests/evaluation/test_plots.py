from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.evaluation import plots
from dmr_pipeline.evaluation.metrics import compute_metrics
from tests.helpers.evaluations import ROUTE, THREE, with_checked, with_curves


def draw_all(folder: Path, episodes: pl.DataFrame, shift: float = 0.0) -> dict[str, bytes]:
    """All five pictures of fixed data; `shift` changes every picture's data a little."""
    generator = np.random.default_rng(0)
    metrics = compute_metrics(
        episodes, recipe="tiny", route=ROUTE, high="always_high", low="always_low", headline="kl_router", bootstrap=100
    )
    metrics["policies"]["kl_router"]["cost"] += shift
    plots.plot_accuracy_cost(metrics, folder / "accuracy_cost.png")
    curved = with_curves(metrics)
    curved["curves"]["first"]["points"][0]["success"] += shift
    plots.plot_curves(curved, folder / "curves.png")
    turns = pl.DataFrame({"turn": np.arange(200) % 20, "kl_high_low": generator.random(200) + shift})
    # A KL of exactly zero must not break the logarithmic axis.
    turns = turns.with_columns(kl_high_low=pl.when(pl.col("turn") == 3).then(0.0).otherwise("kl_high_low"))
    plots.plot_kl_by_turn(turns.with_columns(sensitive=pl.col("kl_high_low") > 0.8), folder / "kl_by_turn.png")
    kl_log = pl.DataFrame({"update": [0, 1, 2], "loss": [0.7, 0.5, 0.4 + shift]})
    grpo_log = pl.DataFrame(
        {
            "update": [0, 1, 2],
            "reward": [0.5, 0.6, 0.7],
            "ratio": [0.4, 0.4, 0.3 + shift],
            "success": [0.8, 0.9, 0.9],
            "tied_groups": [0.5, 0.4, 0.4],
            "divergence": [0.0, 0.01, 0.02],
            "validation_success": [None, None, 0.9],
            "validation_cost": [None, None, 0.4],
        }
    )
    plots.plot_training_curves(kl_log, grpo_log, folder / "training_curves.png")
    probabilities = generator.random(300)
    labels = (generator.random(300) < probabilities - shift).astype(float)
    plots.plot_calibration(probabilities, labels, folder / "calibration.png")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pictures_depend_on_the_data_alone(
    tmp_path: Path, episodes: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw_all(tmp_path / "first", episodes)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 23)
    assert draw_all(tmp_path / "again", episodes) == first
    changed = draw_all(tmp_path / "changed", episodes, shift=0.1)
    assert [name for name in first if first[name] == changed[name]] == []
    assert all(png.startswith(b"\x89PNG") and b"Software" not in png for png in first.values())


@pytest.mark.parametrize("more", [0, 12])
def test_labels_of_close_points_do_not_overlap(
    tmp_path: Path, episodes: pl.DataFrame, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """Measured with the renderer: no two names share pixels, and none leaves the picture."""
    low = episodes.filter(policy="always_low")
    rungs = [low.with_columns(policy=pl.lit(f"always_{number}"), kind=pl.lit("rung")) for number in range(more)]
    episodes = with_checked(pl.concat([episodes, *rungs]))
    figures = []
    figure_of = plots.Figure

    def kept(**arguments: object) -> object:
        figures.append(figure_of(**arguments))
        return figures[-1]

    monkeypatch.setattr(plots, "Figure", kept)
    draw_all(tmp_path, episodes)
    figure = figures[0]
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert len(boxes) == episodes["policy"].n_unique()
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    assert all(box.y0 >= 0 and box.y1 <= figure.bbox.height for box in boxes)


@pytest.mark.parametrize("route", [ROUTE, THREE])
def test_policies_lie_at_their_spend_and_the_axis_says_so(
    tmp_path: Path,
    episodes: pl.DataFrame,
    of_three: pl.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    route: tuple[str, ...],
) -> None:
    names = {"high": "always_high", "low": "always_low", "headline": "kl_router", "bootstrap": 100}
    played = with_checked(episodes if route == ROUTE else of_three)
    metrics, figures, figure_of = compute_metrics(played, recipe="tiny", route=route, **names), [], plots.Figure
    monkeypatch.setattr(plots, "Figure", lambda **arguments: figures.append(figure_of(**arguments)) or figures[-1])
    plots.plot_accuracy_cost(metrics, tmp_path / "accuracy_cost.png")
    by_spend, by_cost = figures[0].axes
    title, label = ("By ratio", "steps in high precision") if route == ROUTE else ("By spend", "spend: cheapest")
    assert by_spend.get_title(loc="left") == title
    assert by_spend.get_xlabel().startswith(label)
    for axes, key in ((by_spend, "spend"), (by_cost, "cost")):
        wanted = {(round(policy[key], 6), round(policy["success"], 6)) for policy in metrics["policies"].values()}
        found = {
            (round(float(x), 6), round(float(y), 6))
            for line in axes.lines
            if line.get_marker() in ("s", "P", "o", "X", "D", "^")
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        }
        assert found == wanted


def test_the_line_by_cost_is_the_hull_of_single_rungs(
    tmp_path: Path, of_three: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From rung to rung and level past the best one; what lies below it is hollow, as random is."""
    won = pl.col("task_id") < "game-0060"
    worse = of_three.filter(policy="always_int4").with_columns(
        policy=pl.lit("always_int8"), success=won, reward=won.cast(pl.Float64), cost=pl.lit(0.6)
    )
    names = {"high": "always_high", "low": "always_low", "headline": "kl_router", "bootstrap": 100}
    metrics = compute_metrics(pl.concat([of_three, worse]), recipe="tiny", route=THREE, **names)
    figures, figure_of = [], plots.Figure
    monkeypatch.setattr(plots, "Figure", lambda **arguments: figures.append(figure_of(**arguments)) or figures[-1])
    plots.plot_accuracy_cost(metrics, tmp_path / "accuracy_cost.png")
    hull, level, *_ = figures[0].axes[1].lines
    assert list(zip(hull.get_xdata(), hull.get_ydata(), strict=True)) == [(0.2, 0.5), (0.4, 0.7), (1.0, 0.9)]
    assert (hull.get_linestyle(), level.get_linestyle(), list(level.get_ydata())) == ("-", ":", [0.9, 0.9])
    hollow = {line.get_xdata()[0] for line in figures[0].axes[1].lines if line.get_markerfacecolor() == "white"}
    assert hollow == {0.5, 0.6}
    filled = {line.get_xdata()[0] for line in figures[0].axes[1].lines if line.get_marker() == "s"} - hollow
    assert filled == {0.2, 0.4, 1.0}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_spread_keeps_order_and_distance(wanted: list[float]) -> None:
    spread: Callable[[list[float], float], list[float]] = plots._spread
    heights = spread(sorted(wanted), 0.1)
    assert all(upper - lower >= 0.1 - 1e-9 for lower, upper in pairwise(heights))
    assert heights[-1] <= 1
    far = [0.1, 0.5, 0.9]
    assert spread(far, 0.1) == far
