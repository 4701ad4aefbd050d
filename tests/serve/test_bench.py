"""`dmr bench serve` on agents that babble: every part runs, and nothing is lost."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmr_pipeline.cli import app
from dmr_pipeline.serve.bench import ServeRecord
from tests.helpers.serving import SERVED


@pytest.mark.slow
def test_every_part_runs(served_project: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", SERVED, "--quick", "--soak", "1", "--json", "figures.json"])
    assert done.exit_code == 0, done.output
    record = ServeRecord.model_validate_json(Path("figures.json").read_text())
    ways = [(row.way, row.sessions) for row in record.rows]
    both = [(way, n) for n in (1, 4) for way in ("upstream alone", "through the server")]
    assert ways == [("in process", 1), ("in process", 4), *both, ("one upstream request in ten fails", 16)]
    assert all(row.requests >= 16 and row.lost == 0 and row.per_second > 0 for row in record.rows)
