"""What kinds of task a benchmark has. Apart from `tasks`, so that nothing else is imported with it."""

from typing import get_args

from dmr_pipeline.environments.alfworld.game import TaskType
from dmr_pipeline.recipe import Games, WebShop


def task_types(benchmark: Games) -> tuple[str, ...]:
    """ALFWorld's six, or WebShop's five categories of products."""
    if isinstance(benchmark, WebShop):
        return ("beauty", "electronics", "fashion", "garden", "grocery")
    return get_args(TaskType)
