"""`dmr trajectories`: what a file of new trajectories must look like, and whether one does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.cli.common import DEFAULT_RECIPE, RecipeOption, console, errors, print_error, user_errors_exit_2
from dmr_pipeline.errors import UserError, printable
from dmr_pipeline.recipe.reading import load_recipe

if TYPE_CHECKING:
    from dmr_pipeline.ingestion.schema import LoggedEpisode

trajectories = typer.Typer(
    help="Check new trajectories before they are dropped into data/incoming/RECIPE/.", no_args_is_help=True
)


@trajectories.command()
def schema() -> None:
    """Print the JSON schema of an episode; on stderr, an example as a line of NAME.jsonl."""
    from dmr_pipeline.ingestion.schema import EXAMPLE, LoggedEpisode

    typer.echo(json.dumps(LoggedEpisode.model_json_schema(), indent=2))
    typer.echo("\nAn episode is a line of NAME.jsonl, or a row of NAME.parquet. Such a line:\n", err=True)
    typer.echo(json.dumps(EXAMPLE), err=True)


@trajectories.command()
@user_errors_exit_2
def validate(
    file: Annotated[Path, typer.Argument(help="NAME.jsonl or NAME.parquet")], recipe: RecipeOption = DEFAULT_RECIPE
) -> None:
    """Say what a file of episodes holds; or, with exit code 2, everything that is wrong with it."""
    from dmr_pipeline.ingestion.incoming import read
    from dmr_pipeline.ingestion.rules import Rules, read_episodes
    from dmr_pipeline.ingestion.stored import STAGE, stored_ids

    loaded = load_recipe(recipe)
    if not file.is_file():
        raise UserError(f"{file} is no file: give one of new trajectories, NAME.jsonl or NAME.parquet")
    folders = {name: artifact_folder(name, recipe) for name in ("benchmark_tasks", STAGE)}
    made = {name: verify(folder).path for name, folder in folders.items() if folder.is_dir()}
    earlier = stored_ids(made[STAGE]) if STAGE in made else set()
    rules = Rules.of(loaded, made.get("benchmark_tasks"))
    try:
        content = read(file.resolve())
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    episodes, problems = read_episodes(file, content, rules, earlier)
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(2)
    console.print(_summary(episodes, loaded.precisions.names, printable(f"{file.name} for {recipe}")))
    if (warning := rules.strangers(episodes)) is not None:
        errors.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    if "benchmark_tasks" not in made:
        console.print(
            f"Not checked: whether its games are held out, since {folders['benchmark_tasks']} is missing; make it with"
            f" `dmr materialize benchmark_tasks --recipe {recipe}`.",
            style="yellow",
            soft_wrap=True,
        )


def _summary(episodes: "list[LoggedEpisode]", ladder: Sequence[str], title: str) -> Table:
    steps = [step for episode in episodes for step in episode.steps]
    table = Table(title=Text(title), box=box.SIMPLE, show_header=False, min_width=len(title))
    table.add_column()
    table.add_column(justify="right")
    table.add_row("episodes", str(len(episodes)))
    table.add_row("steps", str(len(steps)))
    table.add_row("success rate", f"{sum(episode.success for episode in episodes) / len(episodes):.1%}")
    for rung in ladder:
        table.add_row(f"steps at {rung}", f"{sum(step.precision == rung for step in steps) / len(steps):.1%}")
    return table
