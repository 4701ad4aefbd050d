"""`dmr metrics`: the field's metrics of a router, from any table of what two models did and what the router thought."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from dmr_pipeline.cli.common import console, user_errors_exit_2

if TYPE_CHECKING:
    from dmr_pipeline.evaluation.routing_table import TableMetrics


@user_errors_exit_2
def metrics(
    file: Annotated[Path, typer.Argument(help="a table that ends in .parquet, .csv or .jsonl")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """PGR, APGR, CPT, AIQ and QNC of a router between two models, beside random routing and an oracle, with intervals.

    A row a query: query (its id), strong and weak (quality of each model's answer, 0 to 1), score (the router's, higher: send it
    to the strong model); and, if there are costs, strong_cost and weak_cost. Without them the strong model costs 1, the weak one
    nothing.
    """
    from dmr_pipeline.evaluation.routing_table import read_table, table_metrics

    found = table_metrics(read_table(file))
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    console.print(summary_table(found, file.name))
    console.print(curve_table(found))


def summary_table(found: "TableMetrics", title: str) -> Table:
    """A row a router; within 80 columns."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        caption_justify="left",
        caption=f"{found['queries']:,} queries; strong {found['strong']:.1%}, weak {found['weak']:.1%}, the better answer to each"
        f" {found['best_quality']:.1%}. Brackets: {found['confidence']:.0%} bootstrap intervals over queries. CPT, QNC: less is"
        " better. The oracle knows both answers.",
    )
    table.add_column("")
    for column in ("APGR", "CPT(50%)", "CPT(80%)", "AIQ", "QNC"):
        table.add_column(column, justify="right")
    for name in ("router", "random", "oracle"):
        cells = []
        for metric, value in found[name].items():
            interval = found["router_ci95"][metric] if name == "router" else None
            cells.append(_number(value) + (f"\n[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""))
        table.add_row(name, *cells)
    return table


def curve_table(found: "TableMetrics") -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("ratio", "quality", "interval", "cost", "PGR"):
        table.add_column(column, justify="right")
    for point in found["curve"]:
        low, high = point["quality_ci95"]
        table.add_row(
            f"{point['ratio']:.0%}",
            f"{point['quality']:.1%}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{point['cost']:.3f}",
            _number(point["pgr"]),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
