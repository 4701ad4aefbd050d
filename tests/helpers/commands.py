"""`dmr` in this process."""

from typer.testing import CliRunner, Result

from dmr_pipeline.cli import app


def dmr(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))
