"""Tasks in Parquet files, a split each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import polars as pl
from pydantic import BaseModel

_Model = TypeVar("_Model", bound=BaseModel)


class Row(Protocol):
    """A pydantic model that says what a task is about."""

    @property
    def task_id(self) -> str: ...

    @property
    def task_type(self) -> str: ...

    @property
    def instruction(self) -> str: ...

    def model_dump_json(self, *, exclude_defaults: bool) -> str: ...


def write_tasks(tasks: Sequence[Row], path: Path, column: str = "task") -> None:
    """One row a task: id, type, instruction and, in a column of this name, all of it as JSON; what has its default is left
    out."""
    pl.DataFrame(
        {
            "task_id": [task.task_id for task in tasks],
            "task_type": [task.task_type for task in tasks],
            "instruction": [task.instruction for task in tasks],
            column: [task.model_dump_json(exclude_defaults=True) for task in tasks],
        }
    ).write_parquet(path, compression="zstd")


def read_tasks(kind: type[_Model], path: Path, limit: int | None = None, column: str = "task") -> list[_Model]:
    """The first `limit` tasks of a file, all of them by default."""
    rows = pl.read_parquet(path, columns=[column], n_rows=limit)
    return [kind.model_validate_json(task) for task in rows[column]]
