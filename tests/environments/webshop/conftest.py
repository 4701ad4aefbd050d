from pathlib import Path

import pytest

from dmr_pipeline.environments import tasks
from dmr_pipeline.recipe import GeneratedWebShop, Splits, load_recipe
from dmr_pipeline.stage import StageContext


@pytest.fixture(scope="session")
def webshop_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage `benchmark_tasks` makes of a small generated catalogue."""
    output = tmp_path_factory.mktemp("webshop")
    splits = Splits(agent_train=50, router_train=20, validation=100, test=20)
    benchmark = GeneratedWebShop(splits=splits, products=600)
    recipe = load_recipe("webshop-tiny").model_copy(update={"benchmark": benchmark})
    tasks.benchmark_tasks(StageContext(recipe, {}, output, output))
    return output
