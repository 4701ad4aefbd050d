"""What all commands share: the console, and how trouble is told: one line on stderr."""

import logging
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec

import typer
from pydantic import BaseModel
from rich import get_console
from rich.console import Console
from rich.logging import RichHandler

from dmr_pipeline import interrupts
from dmr_pipeline.errors import RaisedElsewhere, UserError, printable, refusal

DEFAULT_RECIPE = "alfworld-tiny"
PACKAGE = Path(__file__).parent.parent
LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
SAID_CHARACTERS = 500
P = ParamSpec("P")

console = get_console()  # the one that the stages' progress bars are on: lines then appear above them
errors = Console(stderr=True, soft_wrap=True)

RecipeOption = Annotated[str, typer.Option("--recipe", help="a recipe, the name of a file in recipes/")]
RecipeArgument = Annotated[str, typer.Argument(help="a recipe, the name of a file in recipes/")]


def user_errors_exit_2(command: Callable[P, None]) -> Callable[P, None]:
    """Each command's edge. Bad input, and files that the system refuses, exit with 2; what nobody foresaw exits with 1 and
    leaves its traceback in a file of the system's temporary folder, which can be written where a project cannot. Ctrl-C and
    SIGTERM exit with 130 and 143. No command calls another one: an edge is the process's."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            interrupts.in_thread(partial(command, *args, **kwargs))
        except UserError as error:
            _fail(str(error), 2)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer ends the program
        except Exception as error:  # noqa: BLE001 - a traceback of a hundred lines hides what happened
            refused = refusal(error)
            if refused is not None:
                _fail(refused, 2)
            _fail(_unforeseen(error), 1)

    return wrapped


def print_error(line: str) -> None:
    errors.print(f"error: {printable(line)}", style="red", markup=False, highlight=False)


def _fail(line: str, code: int) -> NoReturn:
    print_error(line)
    raise typer.Exit(code)


def _unforeseen(error: Exception) -> str:
    """What happened, where in this package and in code of the user that it calls, and where the traceback is."""
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="dmr-", suffix=".log", delete=False) as file:
        file.write(text)
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error.__cause__, RaisedElsewhere):
        frames += error.__cause__.places
    own = [i for i, (file, _) in enumerate(frames) if PACKAGE in Path(file).parents]
    place = ""
    if own:
        (ours, line), theirs = frames[own[-1]], [frame for frame in frames[own[-1] + 1 :] if _of_a_user(frame[0])]
        calling = f", calling {theirs[-1][0]}, line {theirs[-1][1]}" if theirs else ""
        place = f" ({Path(ours).relative_to(PACKAGE.parent)}, line {line}{calling})"
    said = " ".join(str(error).split())[:SAID_CHARACTERS]
    return f"{type(error).__name__}: {said}{place}: this was not foreseen, please report it with {file.name}"


def _of_a_user(filename: str) -> bool:
    """Code that is neither Python's nor installed: a benchmark of one's own, say."""
    return Path(filename).is_file() and not any(library in Path(filename).parents for library in LIBRARIES)


def write_record(path: Path, record: BaseModel) -> None:
    """As JSON, in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage())


@contextmanager
def progress_lines() -> Iterator[None]:
    """What the package logs goes to the terminal, a line each."""
    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False, log_time_format="%H:%M:%S")
    handler.setFormatter(_Printable())
    package = logging.getLogger("dmr_pipeline")
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
