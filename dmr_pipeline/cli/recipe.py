"""`dmr recipe`: what is wrong with a recipe, all at once."""

from typing import Annotated

import typer

from dmr_pipeline.cli.common import console, print_error, user_errors_exit_2
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.reading import check_recipe, recipe_names

recipe = typer.Typer(help="Check recipes, the files in recipes/.", no_args_is_help=True)


@recipe.callback()
def _group() -> None:
    """Typer would make a lone command the group itself."""


@recipe.command()
@user_errors_exit_2
def check(
    name: Annotated[str | None, typer.Argument(help="a recipe, the name of a file in recipes/")] = None,
    everything: Annotated[bool, typer.Option("--all", help="check every recipe")] = False,
) -> None:
    """Say everything that is wrong with a recipe, a line each and with exit code 2; nothing is run."""
    if (name is None) != everything:
        raise UserError("name one recipe, or check every one with --all")
    problems = []
    for one in recipe_names() if name is None else [name]:
        loaded, found = check_recipe(one)
        problems += found
        if loaded is not None:
            console.print(f"{one}: nothing is wrong", highlight=False, soft_wrap=True)
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(2)
