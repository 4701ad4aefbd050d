"""How quick is the shop, and what memory does it take? It is made and opened in fresh processes."""

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from dmr_pipeline.environments.vector import TextVectorEnv
from dmr_pipeline.environments.webshop.catalogue import (
    Product,
    Shop,
    draw_prices,
    open_shop,
    read_pricing,
    write_shop,
    write_terms,
)
from dmr_pipeline.environments.webshop.engine import search_words
from dmr_pipeline.environments.webshop.generator import generate_products
from dmr_pipeline.environments.webshop.goals import ShoppingTask, combinations, price_limit, synthetic_goal
from dmr_pipeline.peak_memory import peak_bytes

P = ParamSpec("P")
T = TypeVar("T")
_PADDING = 80
"""Words added to a generated description on average: with them a searched text has 109 terms, 107 in WebShop's small set."""
_SPREAD = 1.2
"""Standard deviation of the logarithm of that number: with it the median text has 69 terms, 77 there."""
_ZIPF = 1.2
"""Exponent of the words' frequencies: with it a text has 69 different terms on average, 68 there."""
_VOCABULARY = 1_000_000
_QUERIES = 500
_SLOTS = 10
_STEPPING_S = 2.0


@dataclass(frozen=True)
class Making:
    """Of a shop: its products read or generated, indexed and written."""

    products: int
    seconds: float
    peak_bytes: int
    """Most memory that the process held."""
    product_bytes: int
    """Size of the file."""
    index_bytes: int


@dataclass(frozen=True)
class Use:
    """Of a shop in a process of its own."""

    load_s: float
    load_peak_bytes: int
    """Most memory that the process held until the shop was open."""
    searches_s: tuple[float, ...]
    """Of queries that were not asked before."""
    steps_a_second: float
    peak_bytes: int
    """At the end; pages of the index that were read are among them."""


def write_long_shop(count: int, folder: Path) -> None:
    """A shop of generated products whose descriptions are as long as WebShop's."""
    write_shop(_long_products(count), folder)


def _long_products(count: int) -> Iterator[Product]:
    rng = np.random.default_rng(0)
    chances = np.cumsum(np.arange(1.0, _VOCABULARY + 1) ** -_ZIPF)
    lengths = rng.lognormal(np.log(_PADDING) - _SPREAD**2 / 2, _SPREAD, count).astype(int).tolist()
    for product, length in zip(generate_products(count, seed=0), lengths, strict=True):
        words = np.searchsorted(chances, rng.random(length) * chances[-1]).tolist()
        yield replace(product, description=f"{product.description} {' '.join(f'w{word}' for word in words)}")


def make(write: Callable[[Path], object], folder: Path) -> Making:
    """Let `write` make a shop in a process of its own."""
    return _in_a_fresh_process(_make, write, folder)


def _make(write: Callable[[Path], object], folder: Path) -> Making:
    started = time.perf_counter()
    write(folder)
    seconds, peak = time.perf_counter() - started, peak_bytes()
    pricing = read_pricing(folder)
    write_terms(draw_prices(pricing, random.Random(0)), "alphabetic", folder)
    index = sum(path.stat().st_size for path in (folder / "index").iterdir())
    return Making(len(pricing), seconds, peak, (folder / "products.parquet").stat().st_size, index)


def use(folder: Path) -> Use:
    """Open a shop, search for what some of its goals ask for, and walk through episodes at random; in a process of its own."""
    return _in_a_fresh_process(_use, folder)


def _use(folder: Path) -> Use:
    started = time.perf_counter()
    shop = open_shop(folder)
    load_s, load_peak = time.perf_counter() - started, peak_bytes()
    tasks = list(islice(_tasks(shop), _QUERIES))
    searches = []
    for task in tasks:
        words = search_words(task.instruction)
        started = time.perf_counter()
        shop.search(words)
        searches.append(time.perf_counter() - started)
    shop.search.cache_clear()
    return Use(load_s, load_peak, tuple(searches), _steps_a_second(tasks), peak_bytes())


def _tasks(shop: Shop) -> Iterator[ShoppingTask]:
    """Goals of different products, drawn at random."""
    rng = random.Random(0)
    for row in rng.sample(range(len(shop)), len(shop)):
        product = shop.product(row)
        if product.instruction is not None:
            limit = price_limit(shop.prices[row], rng)
            yield ShoppingTask(synthetic_goal(product, limit, rng.randrange(combinations(product))), shop)


def _steps_a_second(tasks: Sequence[ShoppingTask]) -> float:
    """Of all environments of a vector environment together, admissible commands included."""
    env = TextVectorEnv(tasks, _SLOTS, step_limit=15)
    _, infos = env.reset(seed=0)
    rng, steps, spent = random.Random(0), 0, 0.0
    while spent < _STEPPING_S:
        commands = [rng.choice(admissible or ("",)) for admissible in infos["admissible_commands"]]
        started = time.perf_counter()
        *_, infos = env.step(commands)
        spent += time.perf_counter() - started
        steps += _SLOTS
    return steps / spent


def _in_a_fresh_process(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **named).result()
