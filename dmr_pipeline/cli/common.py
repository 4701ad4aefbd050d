"""What all commands share: the console, and bad input as one clear line on stderr with exit code 2."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, ParamSpec

import typer
from rich import get_console
from rich.console import Console
from rich.logging import RichHandler

from dmr_pipeline.errors import UserError, printable

DEFAULT_RECIPE = "alfworld-tiny"
P = ParamSpec("P")

console = get_console()  # the one that the stages' progress bars are on: lines then appear above them
errors = Console(stderr=True, soft_wrap=True)

RecipeOption = Annotated[str, typer.Option("--recipe", help="a recipe, the name of a file in recipes/")]
RecipeArgument = Annotated[str, typer.Argument(help="a recipe, the name of a file in recipes/")]


def user_errors_exit_2(command: Callable[P, None]) -> Callable[P, None]:
    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            errors.print(f"error: {printable(error)}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error

    return wrapped


@contextmanager
def progress_lines() -> Iterator[None]:
    """What the package logs goes to the terminal, a line each."""
    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False, log_time_format="%H:%M:%S")
    package = logging.getLogger("dmr_pipeline")
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
