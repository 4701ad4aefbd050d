"""How far long work is: bars, and lines where nobody sees bars move."""

import logging
import time
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

_SECONDS = 60.0
"""Between two lines."""


class Bars(Progress):
    """`Progress`, which says once a minute how far the bar that moves is where its console is no terminal: a file, or a run of
    Dagster's UI."""

    def __init__(self, *columns: str | ProgressColumn, **options: Any) -> None:  # noqa: ANN401 - as `Progress` has them
        super().__init__(*columns, **options)
        self._said = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:  # noqa: ANN401 - as above
        super().update(task_id, **changes)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if self.console.is_terminal or self.disable or now - self._said < _SECONDS:
            return
        self._said = now
        task = next(task for task in self.tasks if task.id == task_id)
        of = "" if task.total is None else f" of {task.total:,.0f}"
        log.info("%s: %s%s", task.description, f"{task.completed:,.0f}", of)


def training_bars(note: str = "{task.fields[note]}") -> Bars:
    """How far a training is, how long it took and will take, and a note on how it goes; to be used in a `with`.

    Args:
        note: format of what stands behind the bar, of the task's fields.
    """
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn(note),
    )
