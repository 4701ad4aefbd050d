"""Benchmarks whose tasks are drawn by seed, one after the other, and are pydantic models: the least to write down."""

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from dmr_pipeline.environments.base import Demonstration, Episode, Expert
from dmr_pipeline.environments.benchmark import SPLITS, Benchmark, S, fresh_seeds, split_seeds, split_summary


class TaskModel(BaseModel, ABC, frozen=True):
    """A `Task` that is kept as JSON."""

    task_id: str
    task_type: str
    instruction: str

    @abstractmethod
    def episode(self) -> Episode: ...

    @abstractmethod
    def expert(self) -> Expert: ...

    @abstractmethod
    def demonstration(self, rng: random.Random) -> Demonstration: ...


T = TypeVar("T", bound=TaskModel)
log = logging.getLogger(__name__)


class SeededBenchmark(Benchmark[S], Generic[S, T]):
    task_class: ClassVar[type[TaskModel]]

    @abstractmethod
    def draw(self, seed: int) -> T:
        """The task of a seed; ids of different seeds differ."""

    def make_tasks(self, folder: Path) -> dict[str, Any]:
        from dmr_pipeline.environments.task_files import write_tasks

        summary, told = {}, set[str]()
        for split in SPLITS:
            tasks = [self.draw(seed) for seed in split_seeds(self.settings, split)]
            write_tasks(tasks, folder / f"{split}.parquet")
            summary[split] = split_summary([task.task_type for task in tasks])
            contents = [task.model_dump_json(exclude={"task_id"}) for task in tasks]
            if known := sum(content in told for content in contents):
                log.warning(
                    "%d of the %d tasks of %s are, but for their ids, tasks of the splits before it: who has learned those by"
                    " heart wins these; draw from more",
                    known,
                    len(tasks),
                    split,
                )
            told.update(contents)
        return summary

    def read_tasks(self, folder: Path, split: str, limit: int | None = None) -> Sequence[TaskModel]:
        from dmr_pipeline.environments.task_files import read_tasks

        return read_tasks(self.task_class, folder / f"{split}.parquet", limit)

    def fresh_tasks(self, count: int) -> Sequence[TaskModel]:
        return [self.draw(seed) for seed in fresh_seeds(self.settings, count)]
