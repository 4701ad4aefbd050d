"""`dmr plan`: what the stages of a recipe will need, before they run."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box, filesize
from rich.table import Table

from dmr_pipeline.artifacts.folders import DATA_ROOT
from dmr_pipeline.cli.common import RecipeArgument, console, progress_lines, user_errors_exit_2
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.reading import load_recipe

if TYPE_CHECKING:
    from dmr_pipeline.plan.predict import Plan

OF_AGENT = {
    "said": "--success",
    "agent": "as its artifact says of the validation games; --success says otherwise",
    "nothing": "it has played none yet; --success says otherwise",
}


@user_errors_exit_2
def plan(
    recipe: RecipeArgument,
    success: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="share of the games that the agent is taken to win; by default what its artifact says, or 0.85",
        ),
    ] = None,
    read_speed: Annotated[
        float | None,
        typer.Option(min=0.001, help="tokens a second that are read; with --write-speed nothing is measured"),
    ] = None,
    write_speed: Annotated[float | None, typer.Option(min=0.001, help="tokens a second that are written")] = None,
    learn_speed: Annotated[float | None, typer.Option(min=0.001, help="tokens a second that are learned from")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Predict memory, disk and time of each stage from the recipe and the model's config, and refuse what cannot fit.

    No weights are loaded. How fast a model of this shape is here is measured with random ones, which takes some seconds.
    """
    loaded = load_recipe(recipe)
    if (read_speed is None) != (write_speed is None):
        raise UserError("--read-speed and --write-speed: give both, or none to have them measured")
    from dmr_pipeline.plan.predict import plan as predicted
    from dmr_pipeline.plan.speed import Speed

    said = None
    if read_speed is not None and write_speed is not None:
        said = Speed(read_speed, write_speed, learn_speed or read_speed / 3, measured=False)
    if as_json:
        console.quiet = True  # bars of the games that are tried
        try:
            found = predicted(loaded, DATA_ROOT, success, said)
        finally:
            console.quiet = False
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        with progress_lines():
            found = predicted(loaded, DATA_ROOT, success, said)
        _show(found)
    if found.problems:
        raise UserError("; ".join(found.problems))


def _show(found: "Plan") -> None:
    on_gpu = found.device == "cuda"
    title = f"{found.recipe}: {found.parameters:,} weights, on {found.device.upper()}"
    table = Table(title=title, box=box.SIMPLE, show_footer=True)
    total = sum(need.disk for need in found.stages)
    table.add_column("stage", "all", overflow="fold")
    table.add_column("memory", filesize.decimal(max(need.memory for need in found.stages)), justify="right")
    if on_gpu:
        table.add_column("GPU", filesize.decimal(max(need.gpu for need in found.stages)), justify="right")
    table.add_column("disk", filesize.decimal(total), justify="right")
    table.add_column("time", _time(sum(need.seconds for need in found.stages)), justify="right")
    for need in found.stages:
        gpu = [filesize.decimal(need.gpu)] if on_gpu else []
        row = (filesize.decimal(need.memory), *gpu, filesize.decimal(need.disk), _time(need.seconds))
        table.add_row(need.stage, *row)
    console.print(table)
    assumed, speed = found.assumed, found.assumed.speed
    lines = [
        f"An estimate. Free here: {filesize.decimal(found.free_memory)} of memory,"
        + (f" {filesize.decimal(found.free_gpu)} on the GPU," if on_gpu else "")
        + f" {filesize.decimal(found.free_disk)} of disk. Games are made in moments; what DVC caches is not counted.",
        f"The agent wins {assumed.success:.0%} of the games ({OF_AGENT[assumed.success_from]}), as the expert does in"
        f" {assumed.episodes.steps:.1f} steps, and takes {assumed.episodes.step_limit} where it loses; a step reads"
        f" {assumed.episodes.segment:.0f} tokens (the first {assumed.episodes.opening:.0f}) and writes"
        f" {assumed.episodes.action:.1f}.",
        f"A process reads {speed.read:,.0f} tokens a second and writes {speed.write:,.0f}; {assumed.processes} play at once."
        f" Training learns from {speed.learn:,.0f} ({'measured with random weights' if speed.measured else 'as given'}).",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
