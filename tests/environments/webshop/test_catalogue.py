"""A shop's folder gives back what was written, and says what is wrong with it."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr_pipeline.environments.webshop.catalogue import (
    RESULTS,
    HumanInstruction,
    Product,
    open_shop,
    read_pricing,
    search_document,
    write_shop,
    write_terms,
)
from dmr_pipeline.errors import UserError
from tests.helpers.worlds import product, shop

TEXTS = st.text(max_size=8)
TUPLES = st.lists(TEXTS, max_size=3).map(tuple)
PRODUCTS = st.builds(
    lambda title, **fields: product(1, title, **fields),
    TEXTS,
    category=TEXTS,
    query=TEXTS,
    product_category=TEXTS,
    description=TEXTS,
    bullet_points=TUPLES,
    attributes=TUPLES,
    options=st.dictionaries(TEXTS, TUPLES, max_size=3),
    pricing=st.sampled_from([(9.99,), (1.5, 20.0)]),
    instruction=st.none() | TEXTS,
    instruction_attributes=TUPLES,
    human_instructions=st.lists(st.builds(HumanInstruction, TEXTS, TUPLES, TUPLES), max_size=2).map(tuple),
)


@settings(max_examples=30, deadline=None)
@given(PRODUCTS)
def test_products_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, written: Product) -> None:
    folder = tmp_path_factory.mktemp("shop")
    opened = shop([product(0, "mug"), written], folder, [1.0, 7.25])
    assert opened.product(1) == written
    assert list(opened.product(1).options) == list(written.options)
    assert opened.prices == [1.0, 7.25]
    assert read_pricing(folder) == [[9.99], list(written.pricing)]
    assert (len(opened), opened.row(written.asin.lower()), opened.row("b1")) == (2, 1, None)


def test_more_products_than_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmr_pipeline.environments.webshop.catalogue._CHUNK", 4)
    products = [product(number, f"mug number {number}") for number in range(10)]
    opened = shop(products, tmp_path)
    assert [opened.product(row) for row in range(10)] == products
    assert [opened.search(f"{number}") for number in range(10)] == [(number,) for number in range(10)]


def test_the_searched_text() -> None:
    bought = product(
        1, "Red MUG", description="For tea", bullet_points=("Big", "Blue"), options={"a": ("x", "y"), "b": ("z",)}
    )
    assert search_document(bought) == "red mug for tea big a: x, y, and b: z"


def test_at_most_fifty_are_found(tmp_path: Path) -> None:
    opened = shop([product(number, "mug") for number in range(60)], tmp_path)
    assert opened.search("mugs") == tuple(range(RESULTS))
    drawn = opened.at_random("key")
    assert len(set(drawn)) == RESULTS
    assert drawn == opened.at_random("key") != opened.at_random("other")


def test_a_shop_is_opened_once_until_it_changes(tmp_path: Path) -> None:
    opened = shop([product(1, "mug")], tmp_path)
    assert open_shop(tmp_path / ".." / tmp_path.name) is opened
    write_terms([3.0], "alphabetic", tmp_path)
    assert open_shop(tmp_path).prices == [3.0]


def test_what_is_not_a_shop_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none is not a shop, a file is missing"):
        open_shop(tmp_path / "none")
    write_shop([product(1, "mug"), product(2, "lamp")], tmp_path)
    with pytest.raises(UserError, match=r"is not a shop, a file is missing \(.*prices.parquet.*\): make it anew"):
        open_shop(tmp_path)
    write_terms([1.0], "alphabetic", tmp_path)
    with pytest.raises(UserError, match="of different lengths; make it anew"):
        open_shop(tmp_path)


@given(st.integers(0, 100))
def test_products_are_found_by_what_they_are_offered_with(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    products = [
        product(number, "mug", query=rng.choice("abc"), attributes=tuple(rng.choices(["tea", "big"], k=2)))
        for number in range(8)
    ]
    opened = shop(products, tmp_path_factory.mktemp("shop"))
    for wanted in "abc":
        assert opened.rows_where("query", wanted) == tuple(i for i, p in enumerate(products) if p.query == wanted)
    for wanted in ("tea", "big", "none"):
        assert opened.with_attribute(wanted) == tuple(i for i, p in enumerate(products) if wanted in p.attributes)
