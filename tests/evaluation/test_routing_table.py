"""Metrics of a table, against closed forms and a plain second implementation; and what a bad table is told."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.routing_table import TableMetrics, read_table, table_metrics
from tests.helpers.commands import dmr


def make(strong, weak, score, **costs) -> pl.DataFrame:
    columns = {"strong": strong, "weak": weak, "score": score, "strong_cost": 1.0, "weak_cost": 0.0} | costs
    n = len(strong)
    numbers = {name: np.broadcast_to(np.asarray(values, float), n) for name, values in columns.items()}
    return pl.DataFrame({"query": [f"q{i:04d}" for i in range(n)], **numbers})


def compute(table: pl.DataFrame, bootstrap: int = 20, seed: int = 0) -> TableMetrics:
    return table_metrics(table, bootstrap=bootstrap, seed=seed)


STRONG, WEAK = np.arange(100) < 90, np.arange(100) < 50
"""The strong model solves the weak one's 50 queries, and 40 more."""


def test_a_perfect_router() -> None:
    """It needs a call for each query that the strong model alone solves, 40 of 100: the PGR rises to 1 at 0.4."""
    router = compute(make(STRONG, WEAK, STRONG & ~WEAK))["router"]
    assert router["apgr"] == pytest.approx(0.4 / 2 + 0.6)
    assert (router["cpt50"], router["cpt80"], router["qnc"]) == pytest.approx((0.2, 0.32, 0.4))
    assert router["aiq"] == pytest.approx(0.4 * 0.7 + 0.6 * 0.9)


def test_an_inverted_router_is_level_and_then_steep() -> None:
    """Nothing is gained before 60% of the calls. The hull is the line between the models, which mixing reaches."""
    router = compute(make(STRONG, WEAK, ~(STRONG & ~WEAK)))["router"]
    assert router["apgr"] == pytest.approx(0.4 / 2)
    assert (router["cpt50"], router["cpt80"], router["qnc"]) == pytest.approx((0.8, 0.92, 1.0))
    assert router["aiq"] == pytest.approx(0.7)


def test_a_score_that_tells_nothing_is_random_routing() -> None:
    found = compute(make(STRONG, WEAK, np.full(100, 0.3), strong_cost=5.0, weak_cost=1.0))
    assert found["router"] == found["random"]
    assert found["random"] == pytest.approx({"apgr": 0.5, "cpt50": 0.5, "cpt80": 0.8, "aiq": 0.7, "qnc": 1.0})
    assert [point["pgr"] for point in found["curve"]] == pytest.approx([point["ratio"] for point in found["curve"]])
    assert [point["cost"] for point in found["curve"]] == pytest.approx(list(np.linspace(1, 5, 11)))
    drawn = compute(make(np.tile(STRONG, 40), np.tile(WEAK, 40), np.random.default_rng(3).random(4000)))
    assert drawn["router"]["apgr"] == pytest.approx(0.5, abs=0.03)


def test_a_router_that_is_better_than_the_strong_model_and_models_without_a_gap() -> None:
    """10 queries are solved by the weak model alone and 20 by the strong one: at 20 of 40 calls 30 are right, at 10 as many as
    the strong model's 20."""
    strong, weak = np.arange(40) < 20, (np.arange(40) >= 20) & (np.arange(40) < 30)
    found = compute(make(strong, weak, strong * 1.0 - weak, strong_cost=3.0, weak_cost=1.0))
    assert (found["best_quality"], found["router"]) == (0.75, found["oracle"])
    assert max(point["pgr"] for point in found["curve"]) == 2.0
    assert found["router"]["qnc"] == pytest.approx((0.25 * 3 + 0.75 * 1) / 3)
    assert found["router"]["aiq"] == pytest.approx(0.5 * 0.5 + 0.5 * 0.75)  # level from the best point on
    backwards = compute(make(weak, strong, strong, strong_cost=3.0, weak_cost=1.0))
    assert (backwards["router"]["apgr"], backwards["router"]["cpt50"], backwards["router_ci95"]["apgr"]) == (None,) * 3
    assert (backwards["router"]["qnc"], backwards["curve"][5]["pgr"]) == (1.0, None)  # the cheap one is the better one


def plainly(table: pl.DataFrame) -> dict[str, float]:
    """The definitions, threshold by threshold."""
    rows = table.rows(named=True)

    def point(threshold: float) -> tuple[float, float, float]:
        up = [row["score"] >= threshold for row in rows]
        quality = np.mean([row["strong" if high else "weak"] for row, high in zip(rows, up, strict=True)])
        cost = np.mean([row["strong_cost" if high else "weak_cost"] for row, high in zip(rows, up, strict=True)])
        return float(np.mean(up)), float(quality), float(cost)

    points = [point(t) for t in (np.inf, *sorted({row["score"] for row in rows}, reverse=True))]
    ratio, quality, cost = (np.array(values) for values in zip(*points, strict=True))
    fine = np.linspace(0, 1, 20_001)
    recovered = (quality - quality[0]) / (quality[-1] - quality[0])
    at_cost = np.linspace(cost[0], cost[-1], 201)
    hull = np.max(
        [
            np.where(
                at_cost >= c, q + np.clip((at_cost - c) / (other - c), 0, 1) * max(better - q, 0) if other > c else q, 0
            )
            for c, q in zip(cost, quality, strict=True)
            for other, better in zip(cost, quality, strict=True)
        ],
        axis=0,
    )
    knots = np.union1d(fine, ratio)  # a curve may reach a level at one of its points alone
    pgr = np.interp(knots, ratio, recovered)
    good = np.interp(knots, ratio, quality) >= quality[-1] - 1e-9
    return {
        "apgr": float(np.interp(fine, ratio, recovered).mean()),
        "cpt50": float(knots[pgr >= 0.5 - 1e-9][0]),
        "cpt80": float(knots[pgr >= 0.8 - 1e-9][0]),
        "aiq": float(np.trapezoid(hull, at_cost) / (cost[-1] - cost[0])),
        "qnc": float(np.interp(knots, ratio, cost)[good].min() / cost[-1]),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 14), st.booleans())
def test_a_plain_second_implementation(seed: int, n: int, graded: bool) -> None:
    draw = np.random.default_rng(seed)
    strong, weak = (draw.random((2, n)) if graded else draw.integers(0, 2, (2, n))).astype(float)
    weak = np.minimum(weak, np.roll(strong, 1))
    if strong.mean() - weak.mean() < 0.05:
        strong, weak = np.ones(n), weak * 0.5
    table = make(strong, weak, draw.integers(0, 5, n), strong_cost=1 + draw.random(n), weak_cost=draw.random(n))
    assert compute(table, bootstrap=1)["router"] == pytest.approx(plainly(table), abs=4e-3)


def test_the_oracle_is_best_at_every_ratio() -> None:
    draw = np.random.default_rng(1)
    strong, weak = draw.random((2, 60)) * [[1.0], [0.7]]
    table = make(strong, weak, draw.random(60))
    found, oracle = compute(table), compute(make(strong, weak, strong - weak))
    assert found["oracle"] == oracle["router"]
    assert all(a["quality"] <= b["quality"] for a, b in zip(found["curve"], oracle["curve"], strict=True))
    assert max(point["quality"] for point in oracle["curve"]) <= found["best_quality"]


def test_intervals_are_those_of_resampled_tables_and_are_seeded() -> None:
    """As many queries drawn again as there are, each a row of its own."""
    draw = np.random.default_rng(2)
    strong, weak = draw.random(80) < 0.8, draw.random(80) < 0.4
    table = make(strong, weak, draw.random(80) + 0.3 * (strong & ~weak))
    found = compute(table, bootstrap=400)
    values = []
    for seed in range(100):
        rows = table.sample(80, with_replacement=True, seed=seed).with_columns(query=pl.int_range(80))
        values.append(compute(rows, bootstrap=1)["router"]["apgr"])
    assert found["router_ci95"]["apgr"] == pytest.approx(list(np.quantile(values, [0.025, 0.975])), abs=0.05)
    assert found["router_ci95"]["apgr"][0] < found["router"]["apgr"] < found["router_ci95"]["apgr"][1]
    shuffled = table.sample(fraction=1, shuffle=True, seed=1)
    assert compute(shuffled, bootstrap=400) == found
    assert compute(table, bootstrap=400, seed=1)["router_ci95"] != found["router_ci95"]


def test_the_command_reads_each_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(STRONG, WEAK, STRONG & ~WEAK).drop("strong_cost", "weak_cost")
    table = table.with_columns(pl.col("strong", "weak").cast(pl.Boolean))
    table.write_parquet(tmp_path / "t.parquet")
    table.write_csv(tmp_path / "t.csv")
    table.write_ndjson(tmp_path / "t.jsonl")
    printed = [dmr("metrics", str(path), "--json") for path in sorted(tmp_path.iterdir())]
    assert [json.loads(result.stdout)["router"]["cpt80"] for result in printed] == [0.32] * 3
    monkeypatch.setenv("COLUMNS", "80")
    shown = dmr("metrics", str(tmp_path / "t.csv"))
    assert shown.exit_code == 0, shown.output
    assert "0.320" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_what_a_late_row_holds_may_be_of_another_kind(tmp_path: Path, suffix: str) -> None:
    """Whole numbers first, and a half after more rows than anybody looks at to guess."""
    rows = [{"query": i, "strong": 1, "weak": i % 2, "score": i} for i in range(300)]
    rows.append({"query": 300, "strong": 0.5, "weak": 0.25, "score": 0.5})
    path = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    assert read_table(path).row(-1)[1:4] == (0.5, 0.25, 0.5)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.xlsx", "x", "a table ends in .parquet, .csv, .jsonl"),
        ("a.parquet", "x", "cannot be read"),
        ("a.csv", "", "cannot be read"),
        ("a.csv", "query,strong,weak,score\n", "no rows"),
        ("a.csv", "query,strong,score\n1,1,1\n", "no column weak;"),
        ("a.csv", "query,strong,weak,score,weak_cost\n1,1,1,1,1\n", "weak_cost alone; give strong_cost and weak_cost"),
        ("a.csv", "query,strong,weak,score\n1,1,1,1\n1,1,1,1\n", "a query is missing or appears twice"),
        ("a.csv", "query,strong,weak,score\n1,1,1,high\n", "column score holds something that is no number"),
        ("a.csv", "query,strong,weak,score\nx,1,85,1\n", "weak of query 'x' is 85.0; it has to be in [0, 1]"),
        ("a.csv", "query,strong,weak,score\nx,1,,1\n", "weak of query 'x' is None; it has to be in [0, 1]"),
        ("a.csv", "query,strong,weak,score\nx,1,1,NaN\n", "score of query 'x' is nan; it has to be a finite number"),
        ("a.jsonl", '{"query": 1, "strong": 1', "cannot be read"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no such file"):
        read_table(tmp_path / "none.csv")
