from pathlib import Path

import pytest

from tests.helpers.shopping import BENCHMARK, make_tasks


@pytest.fixture(scope="session")
def webshop_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage makes of a small generated catalogue."""
    output = tmp_path_factory.mktemp("webshop") / "benchmark_tasks"
    make_tasks(BENCHMARK, output)
    return output
