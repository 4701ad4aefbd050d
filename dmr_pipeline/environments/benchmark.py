"""A benchmark: all that the pipeline asks of one. `dmr_pipeline.benchmarks` finds it by the name in a recipe."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import JsonValue

from dmr_pipeline import benchmarks
from dmr_pipeline.environments.base import Task
from dmr_pipeline.recipe.benchmark import Games
from dmr_pipeline.recipe.fields import MOST_SEED

SPLITS = ("agent_train", "router_train", "validation", "test")
_SEEDS_A_SPLIT = 10_000_000
"""Each split draws from a seed range of its own, so that no two share a game however large they are."""

S = TypeVar("S", bound=Games)


class Benchmark(ABC, Generic[S]):
    """Made for each use from the recipe's section `benchmark`.

    Recipes are read by commands that show something at once: import what is heavy in the methods that need it.
    """

    section: ClassVar[type[Games]]
    """How the recipe's section `benchmark` looks; the default of its `environment` is the benchmark's name."""
    task_types: ClassVar[tuple[str, ...]]
    """Kinds of task."""
    exact_words: ClassVar[bool] = False
    """Whether what commands name has to come back to the letter. It decides which of the word tokenizers an agent gets that is
    trained here: the other leaves out punctuation, and words that carry nothing."""
    demonstrations_think: ClassVar[bool] = False
    """Whether single-step demonstrations teach thoughts, so that the prompt must have room for them."""
    step_kinds: ClassVar[Mapping[str, str]] = {}
    """Kinds of step that rules of routing go by: name -> what a command of that kind begins with. A step is of a kind where
    such a command is admissible."""

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @abstractmethod
    def make_tasks(self, folder: Path) -> dict[str, Any]:
        """Write the tasks of the four splits, and all that they need, into the artifact of the stage `benchmark_tasks`.

        A table `<split>.parquet` has a row a task, with columns `task_id`, `task_type` and `instruction` at least.

        Returns:
            JSON: the stage's summary, with a `split_summary` for each split.

        Raises:
            UserError: there are fewer tasks than the splits ask for, or official data is missing.
        """

    @abstractmethod
    def read_tasks(self, folder: Path, split: str, limit: int | None = None) -> Sequence[Task]:
        """The first `limit` tasks of a split, all of them by default, from what `make_tasks` has written."""

    @abstractmethod
    def texts(self, folder: Path) -> list[str]:
        """Texts that together hold every word that a tokenizer for the benchmark must know."""

    def fresh_tasks(self, count: int) -> Sequence[Task]:
        """Tasks that no split of any recipe has, so that nothing was ever chosen on them; none where the benchmark has a list of
        tasks that ends."""
        return []

    def notes(self, summary: Mapping[str, JsonValue]) -> list[str]:
        """Sentences for the report, from the stage's summary."""
        return []

    @classmethod
    def names_in(cls, text: str) -> list[str]:
        """Ids of tasks, in small letters, that a log may mean by a text in small letters, however it spells them (see
        task_ids.py)."""
        return []

    @classmethod
    def held_out(cls, name: str) -> str | None:
        """Where a task is held out by the benchmark's own splits, whether or not the recipe has drawn it; None where it is not.

        Args:
            name: one of `names_in`, or a part of an id.
        """
        return None


def benchmark_of(settings: Games) -> Benchmark[Games]:
    """The benchmark of a recipe's section."""
    found: type[Benchmark[Games]] = benchmarks.find(settings.environment)
    return found(settings)


def split_seeds(settings: Games, split: str) -> range:
    """One for each task of a split, for benchmarks whose tasks are drawn by seed."""
    start = (settings.seed * len(SPLITS) + SPLITS.index(split)) * _SEEDS_A_SPLIT
    return range(start, start + getattr(settings.splits, split))


def fresh_seeds(settings: Games, count: int) -> range:
    """Of tasks in no split of any recipe: beyond the ranges of all."""
    start = (MOST_SEED + 1) * len(SPLITS) * _SEEDS_A_SPLIT + settings.seed * _SEEDS_A_SPLIT
    return range(start, start + count)


def split_summary(task_types: Sequence[str], **facts: JsonValue) -> dict[str, Any]:
    """What the stage's summary says of a split."""
    return {"games": len(task_types), **facts, "by_task_type": dict(sorted(Counter(task_types).items()))}
