"""A small generated catalogue, dealt to the splits."""

from pathlib import Path

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.webshop.benchmark import GeneratedWebShop, WebShop
from dmr_pipeline.recipe.benchmark import Splits
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.stages.benchmark_tasks import benchmark_tasks

BENCHMARK = GeneratedWebShop(splits=Splits(agent_train=50, router_train=20, validation=100, test=20), products=600)


def make_tasks(benchmark: WebShop, output: Path) -> StageResult:
    """Run the stage `benchmark_tasks`."""
    output.mkdir()
    recipe = load_recipe("webshop-tiny").model_copy(update={"benchmark": benchmark})
    return benchmark_tasks(StageContext(recipe, {}, output, output))
