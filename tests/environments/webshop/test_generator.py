"""Generated catalogues: reproducible, of few words, and with goals that can be reached in full by reading what pages say."""

import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.environments.webshop.catalogue import Product
from dmr_pipeline.environments.webshop.engine import BACK, BUY, NEXT, PREVIOUS, SUB_PAGES
from dmr_pipeline.environments.webshop.generator import ASINS, asin_of, assortment, generate_products
from dmr_pipeline.environments.webshop.goals import Goal
from dmr_pipeline.environments.webshop.nouns import nouns
from dmr_pipeline.environments.webshop.reward import option_matches, reward, token_set_ratio
from tests.helpers import needs

PRODUCTS = list(generate_products(10_000, 0))
ATTRIBUTE = r"[^\s,]+ [^\s,]+"
ATTRIBUTES = rf"{ATTRIBUTE}(?:, {ATTRIBUTE})*"
PLACE = {attribute: place for place, known in assortment().places.items() for attribute in known}
QUERIES = {query.query: query for category in assortment().categories.values() for query in category.queries}


def named_attributes(instruction: str, query: str) -> dict[str, list[str]] | None:
    """Place -> attributes, in the order of the instruction; None where it breaks the grammar."""
    match = re.fullmatch(
        rf"Find me (?:(?P<before>{ATTRIBUTES}) )?{re.escape(query)}"
        rf"(?: with (?P<with>{ATTRIBUTES}))?(?: for (?P<for>{ATTRIBUTES}))?",
        instruction,
    )
    return match and {place: named.split(", ") for place, named in match.groupdict().items() if named}


def words(products: Sequence[Product]) -> set[str]:
    texts = set(
        itertools.chain.from_iterable(
            (
                p.title,
                p.description,
                *p.bullet_points,
                p.query,
                p.instruction or "",
                *p.options,
                *itertools.chain(*p.options.values()),
            )
            for p in products
        )
    )
    return {word for text in texts for word in re.split(r"[\s.,:-]+", text.lower())}


def texts(product: Product) -> tuple[str, str, str]:
    """As the reward looks attributes up in them."""
    return product.title.lower(), " ".join(product.bullet_points).lower(), product.description.lower()


def test_a_seed_gives_the_same_catalogue_everywhere() -> None:
    """The digest holds for Python 3.11, 3.12 and 3.13."""
    written = json.dumps([asdict(product) for product in PRODUCTS[:500]])
    assert (
        hashlib.sha256(written.encode()).hexdigest()
        == "18ff68ecea2d468130c8f8205ef7b1204bbef24e59d3537fdd1cabb7e0fb52df"
    )


def test_a_product_depends_on_its_seed_and_index_only() -> None:
    assert list(generate_products(5, 0)) == PRODUCTS[:5]
    other = list(generate_products(500, 1))
    assert not {product.asin for product in other} & {product.asin for product in PRODUCTS}
    assert sum(product.title == before.title for product, before in zip(other, PRODUCTS, strict=False)) < 5


def test_asins_of_a_catalogue() -> None:
    assert all(re.fullmatch("B0[A-Z0-9]{8}", product.asin) for product in PRODUCTS)
    assert len({asin_of(index, 12345) for index in range(300_000)}) == 300_000
    for place in range(2, 10):
        counts = Counter(product.asin[place] for product in PRODUCTS)
        assert len(counts) == 36
        assert max(counts.values()) < 2 * len(PRODUCTS) / 36


@given(st.integers(0, ASINS - 1), st.integers(0, ASINS - 1), st.integers(0, ASINS - 1))
def test_no_two_products_share_an_asin(one: int, other: int, first: int) -> None:
    assert (asin_of(one, first) == asin_of(other, first)) == (one == other)


def test_few_words_whatever_the_size() -> None:
    known = words(PRODUCTS[:5000])
    assert len(known) < 700
    assert words(PRODUCTS[5000:]) <= known


def test_prices() -> None:
    assert len({price for product in PRODUCTS for price in product.pricing}) <= 400
    for product in PRODUCTS:
        least, greatest = QUERIES[product.query].dollars
        assert 5 <= least <= product.pricing[0] < greatest + 1 <= 121
        assert list(product.pricing) == sorted(set(product.pricing))
        assert product.price_tag == " to ".join(f"${price}" for price in product.pricing)
    assert abs(sum(len(product.pricing) == 2 for product in PRODUCTS) / len(PRODUCTS) - 0.15) < 0.02


def test_titles_are_of_six_to_twelve_words() -> None:
    assert {len(product.title.split()) for product in PRODUCTS} == set(range(6, 13))
    assert all(QUERIES[product.query].kind in product.title.lower() for product in PRODUCTS)


def test_every_attribute_can_be_read_and_no_other() -> None:
    hidden = 0
    for product in PRODUCTS:
        title, bullet_points, description = texts(product)
        assert len(product.attributes) in (2, 3, 4)
        untitled = [attribute for attribute in product.attributes if attribute not in title]
        hidden += len(untitled)
        assert len(untitled) <= 1
        assert all(attribute in bullet_points for attribute in untitled)
        told = title.replace(QUERIES[product.query].kind, "|"), bullet_points, description
        read = {attribute for attribute in PLACE if any(attribute in text for text in told)}
        assert read == set(product.attributes), product
    assert abs(hidden / len(PRODUCTS) - 0.25) < 0.02


def test_the_assortment_fits_together() -> None:
    parts = {word for attribute in PLACE for word in attribute.split()}
    for category in assortment().categories.values():
        assert not parts & {word.lower() for word in (*category.words, *category.brands, *assortment().models)}
        for query in category.queries:
            assert 8 <= len(set(query.attributes) & set(PLACE)) == len(query.attributes)
    for product in PRODUCTS:
        assert all(len(group.intersection(product.attributes)) <= 1 for group in assortment().exclusive)


def test_no_attribute_passes_for_another() -> None:
    for query in QUERIES.values():
        for one, other in itertools.combinations(query.attributes, 2):
            assert token_set_ratio(one, other) <= 85, (one, other)


def test_no_option_passes_for_another() -> None:
    """Nor for a colour: the reward knows an option with a colour's name inside as that colour, and never finds its own goal."""
    for query in QUERIES.values():
        offered = [(name, value) for name, pool in query.options.items() for value in assortment().values[pool]]
        assert len({value for _, value in offered}) == len(offered), "pages know options by their values"
        for wanted in offered:
            assert [value for _, value in offered if option_matches(value, wanted)] == [wanted[1]]
    values = set(itertools.chain.from_iterable(assortment().values.values()))
    assert not values & {BACK, BUY, NEXT, PREVIOUS, "search", *SUB_PAGES}


def test_options() -> None:
    for product in PRODUCTS:
        assert all(2 <= len(set(values)) == len(values) <= 5 for values in product.options.values())
    assert {len(product.options) for product in PRODUCTS} == {0, 1, 2, 3}


def test_the_goals_own_product_with_its_options_earns_all() -> None:
    rng = random.Random(0)
    for product in PRODUCTS[:2000]:
        options = {name: rng.choice(values) for name, values in product.options.items()}
        goal = Goal(
            index=0,
            asin=product.asin,
            category=product.category,
            query=product.query,
            name=product.title,
            product_category=product.product_category,
            instruction=product.instruction or "",
            attributes=product.instruction_attributes,
            price_upper=product.pricing[-1],
            options=options,
            weight=1.0,
        )
        assert reward(product, product.pricing[-1], options.values(), goal, nouns("alphabetic")) == 1.0
        if options:
            assert reward(product, product.pricing[-1], (), goal, nouns("alphabetic")) < 1.0


def test_instructions_have_the_originals_grammar() -> None:
    instructed = [product for product in PRODUCTS if product.instruction is not None]
    assert abs(len(instructed) / len(PRODUCTS) - 0.45) < 0.02
    for product in PRODUCTS:
        if product.instruction is None:
            assert product.instruction_attributes == ()
            continue
        named = named_attributes(product.instruction, product.query)
        assert named is not None, product.instruction
        assert tuple(itertools.chain(*named.values())) == product.instruction_attributes
        assert all(PLACE[attribute] == place for place, attributes in named.items() for attribute in attributes)
        assert set(product.instruction_attributes) <= set(product.attributes)
        # What stands in one place keeps the order of the product's attributes.
        for attributes in named.values():
            assert attributes == [attribute for attribute in product.attributes if attribute in attributes]
    assert {len(product.instruction_attributes) for product in instructed} == {1, 2, 3}


@needs.webshop_files
def test_the_original_instructions_have_that_grammar() -> None:
    data = needs.WEBSHOP_DATA
    items = json.loads((data / "items_shuffle_1000.json").read_text(encoding="utf-8"))
    queries = {item["asin"]: item["query"].lower().strip() for item in items}
    notes = json.loads((data / "items_ins_v2_1000.json").read_text(encoding="utf-8"))
    originals = {asin: note for asin, note in notes.items() if note.get("instruction")}
    assert len(originals) == 415
    places = defaultdict(set)
    for asin, note in originals.items():
        named = named_attributes(note["instruction"], queries[asin])
        assert named is not None, note["instruction"]
        assert list(itertools.chain(*named.values())) == note["instruction_attributes"]
        for place, attributes in named.items():
            for attribute in attributes:
                places[attribute].add(place)
    common = [attribute for attribute in PLACE if attribute in places]
    assert len(common) > 0.7 * len(PLACE)
    assert all(places[attribute] == {PLACE[attribute]} for attribute in common)


def test_choosing_needs_reading() -> None:
    """Of 1,000 products, each query has several that differ in their attributes and few that have all a goal asks for."""
    products = PRODUCTS[:1000]
    of_query = defaultdict(list)
    for product in products:
        of_query[product.query].append(product)
    assert set(of_query) == set(QUERIES)
    assert min(map(len, of_query.values())) >= 8
    assert min(len({product.attributes for product in alike}) for alike in of_query.values()) >= 8
    fitting = [
        sum(set(product.instruction_attributes) <= set(other.attributes) for other in of_query[product.query])
        / len(of_query[product.query])
        for product in products
        if product.instruction
    ]
    assert math.fsum(fitting) / len(fitting) < 0.3
