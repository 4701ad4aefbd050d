"""`dmr router`: the router in use, how it came to be so, and what a person can do about it."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.cli.common import DEFAULT_RECIPE, RecipeOption, console, progress_lines, user_errors_exit_2
from dmr_pipeline.recipe.reading import load_recipe

if TYPE_CHECKING:
    from dmr_pipeline.release.history import Decision, Releases

STAGE = "released_router"

router = typer.Typer(help="The router in use: its history, and releases by hand.", no_args_is_help=True)


@router.command()
@user_errors_exit_2
def history(recipe: RecipeOption = DEFAULT_RECIPE) -> None:
    """Show every decision about which router is in use."""
    load_recipe(recipe)
    releases = _read_releases(recipe)
    table = Table(title=f"routers of {recipe}", box=box.SIMPLE)
    for column in ("", "number", "router"):
        table.add_column(column, no_wrap=True)
    for column in ("decision", "success", "cost"):
        table.add_column(column)
    table.add_column("reason", overflow="fold")
    for decision in releases.decisions:
        used = decision.number == releases.current
        marks = ("*" if used else "", str(decision.number), decision.router[:7], decision.decision.replace("_", " "))
        table.add_row(*marks, *_compared(decision), decision.reason, style="green" if used else None)
    console.print(table)
    console.print(
        "* is in use. Success (points, with its interval) and cost are against the router in use at the time."
    )


@router.command("promote")
@user_errors_exit_2
def promote_by_hand(recipe: RecipeOption = DEFAULT_RECIPE) -> None:
    """Release the newly trained router, whatever a comparison says."""
    from dmr_pipeline.stages.released_router import promote

    load_recipe(recipe)
    _release(recipe, promote)


@router.command()
@user_errors_exit_2
def rollback(
    recipe: RecipeOption = DEFAULT_RECIPE,
    to: Annotated[int | None, typer.Option(help="number of an earlier release; without it, the one before")] = None,
) -> None:
    """Release an earlier router again. Its files come from DVC's cache, or from its remote."""
    from dmr_pipeline.release.history import earlier_release
    from dmr_pipeline.stages.released_router import roll_back
    from dmr_pipeline.versioning.trained_routers import trained_router

    load_recipe(recipe)
    earlier = earlier_release(_read_releases(recipe).decisions, to)
    with trained_router(recipe, earlier.router) as folder:
        _release(recipe, partial(roll_back, to=earlier.number, router=folder))


@router.command()
@user_errors_exit_2
def replay(
    release: Annotated[int, typer.Argument(help="number of a release, as `dmr router history` shows it")],
    recipe: RecipeOption = DEFAULT_RECIPE,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Estimate how a release would do on the episodes that agents at work have logged.

    By the propensities in the log, self-normalised and doubly robust; the log has to have drawn some decisions at random
    (`dmr serve --epsilon`), or there is nothing to go by, which is refused.
    """
    loaded = load_recipe(recipe)
    from dmr_pipeline.serve.replay import replay as replayed

    found = replayed(loaded, release)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    seen = found.estimate
    table = Table(title=f"release {release} of {recipe} on {seen.episodes:,} logged episodes", box=box.SIMPLE)
    table.add_column("mean outcome")
    for column in ("estimate", "from", "to"):
        table.add_column(column, justify="right")
    table.add_row("logged", f"{seen.logged:.3f}")
    for name, interval in (("self-normalised", seen.self_normalised), ("doubly robust", seen.doubly_robust)):
        table.add_row(name, *(f"{number:.3f}" for number in interval))
    console.print(table)
    console.print(
        f"They tell as much as {seen.effective:.1f} episodes of its own. It agrees with {found.agreement:.1%} of the logged"
        f" decisions. {found.left_out} episodes are left out: they do not tell how they were decided."
    )


def _release(recipe: str, run: Callable[[StageContext], StageResult]) -> None:
    """Through Dagster and DVC, so that the record is that of any run."""
    from dmr_pipeline.defs import runs  # Dagster takes a second to import

    stages = [replace(stage, run=run) if stage.name == STAGE else stage for stage in pipeline.STAGES]
    with progress_lines():
        runs.materialize(stages, recipe, [STAGE], force=True)


def _read_releases(recipe: str) -> "Releases":
    from dmr_pipeline.release.history import read_releases

    return read_releases(verify(artifact_folder(STAGE, recipe)).path)


def _compared(decision: "Decision") -> tuple[str, str]:
    comparison = decision.comparison
    if comparison is None:
        return "", ""
    low, high = comparison.interval
    return (
        f"{100 * comparison.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        f"{comparison.candidate.cost:.3f} (was {comparison.released.cost:.3f})",
    )
