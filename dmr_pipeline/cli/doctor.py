"""`dmr doctor`: what this machine brings, and what to do about the rest."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from dmr_pipeline.cli.common import console, user_errors_exit_2


@user_errors_exit_2
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Look at this machine and the project's folder, and say what is missing for which purpose.

    Exits with 1 where a part is broken that nothing runs without.
    """
    from dmr_pipeline.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table(box=box.SIMPLE)
        for column in ("part", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            mark = "[green]✓[/]" if finding.found else "[red]✗[/]" if finding.required else "[yellow]–[/]"
            table.add_row(finding.part, f"{mark} {escape(finding.detail)}", escape(finding.remedy))
        console.print(table)
    if any(finding.required and not finding.found for finding in findings):
        raise typer.Exit(1)
