"""The bench measures what it says."""

from functools import partial
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest
from typer.testing import CliRunner

from dmr_pipeline.cli import app
from dmr_pipeline.environments.webshop import bench
from dmr_pipeline.environments.webshop.catalogue import open_shop, search_document
from dmr_pipeline.environments.webshop.search import terms


def test_the_bench_times_what_it_says(tmp_path: Path) -> None:
    ballast = np.ones(150_000_000)  # 1.2 GB that are not the bench's own
    made = bench.make(partial(bench.write_long_shop, 300), tmp_path / "shop")
    assert (made.products, len(open_shop(tmp_path / "shop"))) == (300, 300)
    assert 50e6 < made.peak_bytes < ballast.nbytes
    assert made.product_bytes == (tmp_path / "shop" / "products.parquet").stat().st_size
    assert made.index_bytes > 300 * 50 * 8
    used = bench.use(tmp_path / "shop")
    assert min(made.seconds, median(used.searches_s), used.load_s, used.steps_a_second) > 0
    assert 50e6 < used.load_peak_bytes <= used.peak_bytes < ballast.nbytes


def test_long_descriptions_make_texts_as_long_as_those_of_webshop() -> None:
    """WebShop's small set has 107 terms on average, 68 of them different, and half of the products have fewer than 77."""
    lengths = [terms(search_document(product)) for product in bench._long_products(2000)]
    assert mean(map(len, lengths)) == pytest.approx(107, rel=0.1)
    assert median(map(len, lengths)) == pytest.approx(77, rel=0.15)
    assert mean(len(set(found)) for found in lengths) == pytest.approx(68, rel=0.1)


def test_the_bench_command_prints_every_number(tmp_path: Path) -> None:
    arguments = ["bench", "env", "--env", "webshop", "--products", "40"]
    result = CliRunner().invoke(app, arguments, env={"WEBSHOP_DATA": None})
    assert result.exit_code == 0, result.output
    for words in ("products", "make the shop", "index on disk", "open it", "search, median", "steps a second", "Zipf"):
        assert words in result.stdout
    assert "the authors'" not in result.stdout


def test_without_games_the_bench_of_alfworld_exits_with_2() -> None:
    result = CliRunner().invoke(app, ["bench", "env"], env={"ALFWORLD_DATA": None})
    assert result.exit_code == 2
    assert "--games or $ALFWORLD_DATA" in result.stderr
