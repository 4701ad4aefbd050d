"""`dmr bench serve`: latency, requests a second, and memory of the server."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from dmr_pipeline.cli.common import RecipeArgument, console, user_errors_exit_2, write_record
from dmr_pipeline.recipe.reading import load_recipe


@user_errors_exit_2
def bench_serve(
    recipe: RecipeArgument,
    quick: Annotated[bool, typer.Option("--quick", help="few sessions: whether every part runs")] = False,
    soak: Annotated[float, typer.Option(min=0, help="seconds with upstreams of which one request in ten fails")] = 0.0,
    json: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """Measure `dmr serve` on a ladder and a release that are made: requests a second and their latency at 1, 16 and 64 sessions,
    in process, and over an upstream that answers at once, beside that upstream alone; memory a session, of 500 that are held.

    Exits with 1 where a request is lost.
    """
    loaded = load_recipe(recipe)
    from dmr_pipeline.artifacts.folders import artifact_folder
    from dmr_pipeline.artifacts.manifest import verify
    from dmr_pipeline.precision.ladder import read_ladder
    from dmr_pipeline.serve import bench

    route = read_ladder(verify(artifact_folder("quantized_checkpoints", loaded.name)).path).route
    case = (bench.QUICK if quick else bench.Case()).model_copy(update={"soak_seconds": soak})
    record = bench.bench_serve(recipe, route[0], route[-1], case)
    table = Table(title=f"serving {recipe}", box=box.SIMPLE)
    for column in ("", "sessions", "requests", "lost", "a second", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right" if column else "left")
    for row in record.rows:
        figures = (f"{row.per_second:,.1f}", f"{row.p50_ms:,.1f}", f"{row.p99_ms:,.1f}")
        table.add_row(row.way, str(row.sessions), f"{row.requests:,}", str(row.lost), *figures)
    console.print(table)
    console.print(
        f"added by the server, one session at a time: p50 {record.added_p50_ms:.1f} ms, p99 {record.added_p99_ms:.1f} ms."
        f" {record.held_sessions} sessions held in process: {record.bytes_a_session / 1e6:.2f} MB each.",
        highlight=False,
    )
    if json is not None:
        write_record(json, record)
    if any(row.lost for row in record.rows):
        raise typer.Exit(1)
