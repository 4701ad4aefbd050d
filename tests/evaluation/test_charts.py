from collections.abc import Iterator

import altair
import polars as pl
import pytest

from dmr_pipeline.evaluation import charts
from dmr_pipeline.evaluation.figures import calibration_bins, thinned
from dmr_pipeline.evaluation.metrics import compute_metrics
from dmr_pipeline.evaluation.results import Metrics
from dmr_pipeline.evaluation.viewer import turns
from tests.helpers.evaluations import ROUTE, THREE, with_checked, with_rule
from tests.helpers.reports import figures_of_logs, metrics_of


@pytest.fixture
def metrics(episodes: pl.DataFrame) -> Metrics:
    return metrics_of(with_checked(with_rule(episodes)))


@pytest.fixture
def steps() -> pl.DataFrame:
    """Two games of the router: float acts at turn 1 of both, and at turn 0 of one."""
    rows = [("g0", 0, ROUTE[0], 0.8), ("g0", 1, ROUTE[0], 0.6), ("g1", 0, ROUTE[1], 0.2), ("g1", 1, ROUTE[0], 0.6)]
    table = pl.DataFrame(rows, schema=["task_id", "turn", "precision", "level"], orient="row")
    return table.with_columns(policy=pl.lit("kl_router"), exceedance=pl.concat_list("level"))


def all_specs(metrics: Metrics, steps: pl.DataFrame) -> Iterator[charts.Spec]:
    for by in ("cost", "spend"):
        yield charts.plane(metrics, by)
        yield charts.curves(metrics, by)
    yield charts.by_task_type(metrics)
    yield charts.asked_by_task_type(metrics)
    yield charts.asked_by_turn(metrics, turns(metrics, steps).to_dicts())
    figures = figures_of_logs()
    yield from charts.training(figures).values()
    yield charts.calibration(figures)
    yield charts.kl_by_turn(figures)


def test_all_charts_are_vega_lite(metrics: Metrics, steps: pl.DataFrame) -> None:
    specs = [*all_specs(metrics, steps)]
    assert len(specs) == 16
    for spec in specs:
        assert spec["data"]["values"]
        altair.LayerChart.from_dict(spec)  # validates


def test_the_plane_shows_the_numbers_of_the_metrics(metrics: Metrics) -> None:
    for by in ("cost", "spend"):
        spec = charts.plane(metrics, by)
        rows = {row["series"]: row for row in spec["data"]["values"]}
        assert list(rows) == list(metrics["policies"]) == spec["params"][0]["value"]
        for name, policy in metrics["policies"].items():
            assert [rows[name][key] for key in ("success", "cost", "spend")] == [
                policy[key] for key in ("success", "cost", "spend")
            ]
            assert [rows[name]["from"], rows[name]["to"]] == policy["ci95"]
            assert [rows[name]["cost_from"], rows[name]["cost_to"]] == policy["cost_ci95"]
            low, high = policy["ci95"]
            assert rows[name]["interval"] == f"{low * 100:.1f} to {high * 100:.1f}%"
    line = charts.plane(metrics, "cost")["layer"][0]["data"]["values"]
    hull = [(point["cost"], point["success"]) for point in metrics["hull"]]
    assert [(row["cost"], row["success"]) for row in line[:-1]] == hull
    assert line[-1]["success"] == hull[-1][1]


def test_task_types_and_curves_show_the_numbers_of_the_metrics(metrics: Metrics) -> None:
    for row in charts.by_task_type(metrics)["data"]["values"]:
        of_type = metrics["policies"][row["series"]]["by_task_type"][row["task type"]]
        assert [row["success"], row["from"], row["to"], row["games"]] == [
            of_type["success"],
            *of_type["ci95"],
            of_type["n"],
        ]
    points = [point for curve in metrics["curves"].values() for point in curve["points"]]
    shown = charts.curves(metrics, "cost")["data"]["values"]
    assert [(row["budget"], row["success"], row["cost"], row["spend"]) for row in shown] == [
        (point["budget"], point["success"], point["cost"], point["spend"]) for point in points
    ]


def test_turns_are_counted_by_router(metrics: Metrics, steps: pl.DataFrame) -> None:
    rows = charts.asked_by_turn(metrics, turns(metrics, steps).to_dicts())["data"]["values"]
    shown = [(row["turn"], row["ratio"], row["probability"], row["steps"], row["running"]) for row in rows]
    assert shown == [(0, 0.5, 0.5, 2, 0.02), (1, 1.0, pytest.approx(0.6), 2, 0.02)]


def test_no_two_series_look_alike_and_without_colour_what_is_compared_first_differs(
    metrics: Metrics, of_three: pl.DataFrame
) -> None:
    names = {"high": "always_high", "low": "always_low", "headline": "kl_router"}
    for its in (metrics, compute_metrics(of_three, recipe="tiny", route=THREE, **names)):
        series = charts.policy_series(its)
        looks = [(one.colour, one.shape, one.filled) for one in series]
        assert len(set(looks)) == len(looks)
        first = [(one.shape, one.filled) for one in series if one.name in charts.few(its)]
        assert len(set(first)) == len(first) >= 3
    curves = charts.curve_series(metrics)
    assert len({(one.shape, tuple(one.dash)) for one in curves}) == len(curves)


def test_a_long_log_is_thinned_to_means_over_equally_many_updates() -> None:
    log = pl.DataFrame({"update": range(1, 1001), "loss": [float(update) for update in range(1, 1001)]})
    shown = thinned(log)
    assert shown["update"].to_list() == [*range(5, 1001, 5)]
    assert shown["loss"].to_list() == [update - 2.0 for update in range(5, 1001, 5)]
    assert thinned(log.head(3)).equals(log.head(3))
    assert thinned(pl.DataFrame()).is_empty()


def test_calibration_bins_hold_equally_many_steps() -> None:
    probabilities = pl.Series([0.9, 0.1, 0.2, 0.8]).to_numpy()
    bins = calibration_bins(probabilities, pl.Series([1.0, 0.0, 1.0, 1.0]).to_numpy(), bins=2)
    assert bins["predicted"].to_list() == pytest.approx([0.15, 0.85])
    assert bins["observed"].to_list() == [0.5, 1.0]
    assert bins["steps"].to_list() == [2, 2]
