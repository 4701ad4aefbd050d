"""Long work is told of where no bar can be seen to move."""

import io
import logging

import pytest
from rich.console import Console

from dmr_pipeline import progress
from dmr_pipeline.progress import Bars


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_a_minute_where_the_console_is_no_terminal(
    clock: list[float], caplog: pytest.LogCaptureFixture, terminal: bool
) -> None:
    with (
        caplog.at_level(logging.INFO, "dmr_pipeline"),
        Bars(console=Console(file=io.StringIO(), force_terminal=terminal)) as bars,
    ):
        games = bars.add_task("int3 plays validation games", total=2000)
        layers = bars.add_task("layers", total=None)
        for second in range(130):
            clock[0] += 1
            bars.advance(games, 10)
            if second == 100:
                bars.update(layers, completed=7)  # the minute is not over
        clock[0] += 60
        bars.update(layers, completed=8, total=30)
        bars.advance(layers)
    said = [record.getMessage() for record in caplog.records]
    lines = [
        "int3 plays validation games: 600 of 2,000",
        "int3 plays validation games: 1,200 of 2,000",
        "layers: 8 of 30",
    ]
    assert said == ([] if terminal else lines)
