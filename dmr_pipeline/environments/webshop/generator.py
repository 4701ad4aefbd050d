"""New WebShop catalogues by seed: products that read like the original's, from a vocabulary of a few hundred words.

`assortment.json` holds the words. Attributes are ones that WebShop knows, and so are most queries and option names; brands are
invented.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import combinations, permutations
from string import ascii_uppercase, capwords, digits
from typing import Literal

from dmr_pipeline.environments.webshop.catalogue import Product, price_tag
from dmr_pipeline.frozen_model import FrozenModel

Place = Literal["before", "with", "for"]
"""Where an instruction names an attribute: before the query, or after it behind one of these words."""

_TITLE_WORDS = (6, 12)
_INSTRUCTED = 0.45
"""Share of the products that have an instruction: 0.415 of the original's small set."""
_HIDDEN = 0.25
"""Share with one attribute that only a bullet point tells."""
_ATTRIBUTES = (2, 3, 4)
"""Of a product, each number equally often."""
_ASKED_FOR = (1, 2, 2, 3)
"""Attributes of an instruction, each number as often as it stands here."""
_OFFERED = 0.6
"""Share of the products of a query that offer one of its options."""
_VALUES = (2, 3, 4, 5)
_FILLING = 3
"""Words of a title at most that are neither brand nor kind nor attribute."""
_BULLET_POINTS = (2, 3, 4)
_RANGES = 0.15
"""Share of the products whose price is a range."""
_CENTS = ("99", "99", "49", "0")
_BULLET_POINT: dict[Place, str] = {"before": "Good to know: {}", "with": "Comes with {}", "for": "Made for {}"}
_PAIRS = [a + b for a in ascii_uppercase + digits for b in ascii_uppercase + digits]
_HALF = len(_PAIRS) ** 2
ASINS = _HALF**2
"""So many products can be told apart."""


class Query(FrozenModel):
    """A kind of product that is searched for."""

    query: str
    """Lower case, plural where there is one."""
    kind: str
    """The same in the singular, for titles."""
    product_category: str
    attributes: tuple[str, ...]
    """What its products may have."""
    options: dict[str, str]
    """Option name -> list of values that it is drawn from."""
    dollars: tuple[int, int]
    """Least and greatest price; the end of a range may lie up to ten dollars above."""


class Category(FrozenModel):
    brands: tuple[str, ...]
    words: tuple[str, ...]
    """What titles praise products with. None is part of an attribute."""
    queries: tuple[Query, ...]


class Assortment(FrozenModel):
    """What catalogues are made of."""

    places: dict[Place, tuple[str, ...]]
    """Every attribute, two words each, by its place in an instruction."""
    exclusive: tuple[frozenset[str], ...]
    """Attributes of which a product has one at most."""
    values: dict[str, tuple[str, ...]]
    """Lists of option values. None holds a colour's name inside another word ('tan' in 'standard') and none has all the words
    of another: WebShop's reward would take the one for the other."""
    models: tuple[str, ...]
    """What some titles end with."""
    descriptions: tuple[str, ...]
    """Sentences, with a place for the kind of product."""
    bullet_points: tuple[str, ...]
    """Those that tell nothing."""
    categories: dict[str, Category]


@cache
def assortment() -> Assortment:
    return Assortment.model_validate_json((files(__package__) / "assortment.json").read_text(encoding="utf-8"))


def generate_products(count: int, seed: int) -> Iterator[Product]:
    """The first `count` products of a seed's endless catalogue: each depends on the seed and its index only."""
    shelves = _shelves()
    first_asin = random.Random(f"webshop-asins-{seed}").randrange(ASINS)
    rng = random.Random()
    for index in range(count):
        rng.seed(f"webshop-product-{seed}-{index}")
        yield _product(rng, rng.choice(shelves), asin_of(index, first_asin))


@dataclass(frozen=True)
class _Shelf:
    """A query with all its choices laid out, so that a product takes few draws."""

    category: str
    query: Query
    brands: tuple[str, ...]
    words: list[list[tuple[str, ...]]]
    """One list for each number of words, from none."""
    models: tuple[str, ...]
    title_kind: str
    attribute_sets: list[list[tuple[str, ...]]]
    """One list for each number of attributes; attributes in the order in which an instruction names them."""
    title_attributes: dict[str, str]
    attribute_bullet_points: dict[str, str]
    bullet_points: list[list[tuple[str, ...]]]
    """One list for each number of them."""
    descriptions: list[list[str]]
    """Of one sentence, and of two."""
    option_values: dict[str, list[list[tuple[str, ...]]]]
    """Option name -> one list for each number of values; values in the order of the assortment."""
    place: dict[str, Place]


@cache
def _shelves() -> list[_Shelf]:
    table = assortment()
    place: dict[str, Place] = {attribute: place for place, known in table.places.items() for attribute in known}
    order = {attribute: i for i, attribute in enumerate(place)}
    shelves = []
    for name, category in table.categories.items():
        for query in category.queries:
            attributes = sorted(query.attributes, key=order.__getitem__)
            shelves.append(
                _Shelf(
                    category=name,
                    query=query,
                    brands=category.brands,
                    words=[list(combinations(category.words, number)) for number in range(_FILLING + 1)],
                    models=table.models,
                    title_kind=capwords(query.kind),
                    attribute_sets=[
                        [
                            chosen
                            for chosen in combinations(attributes, number)
                            if all(len(group.intersection(chosen)) <= 1 for group in table.exclusive)
                        ]
                        for number in _ATTRIBUTES
                    ],
                    title_attributes={a: capwords(a) for a in attributes},
                    attribute_bullet_points={a: _BULLET_POINT[place[a]].format(a) for a in attributes},
                    bullet_points=[list(combinations(table.bullet_points, number)) for number in _BULLET_POINTS],
                    descriptions=[
                        [
                            " ".join(sentences).format(kind=query.kind)
                            for sentences in permutations(table.descriptions, number)
                        ]
                        for number in (1, 2)
                    ],
                    option_values={
                        option: [
                            list(combinations(table.values[values], number))
                            for number in _VALUES
                            if number <= len(table.values[values])
                        ]
                        for option, values in query.options.items()
                    },
                    place=place,
                )
            )
    return shelves


def _product(rng: random.Random, shelf: _Shelf, asin: str) -> Product:
    attributes = rng.choice(rng.choice(shelf.attribute_sets))
    told = rng.choice(attributes)
    hidden = told if rng.random() < _HIDDEN else None
    bullet_points = list(rng.choice(rng.choice(shelf.bullet_points)))
    bullet_points[rng.randrange(len(bullet_points))] = shelf.attribute_bullet_points[told]
    pricing = _pricing(rng, *shelf.query.dollars)
    wanted: tuple[str, ...] = ()
    if rng.random() < _INSTRUCTED:
        wanted = rng.choice(list(combinations(attributes, min(rng.choice(_ASKED_FOR), len(attributes)))))
    return Product(
        asin=asin,
        category=shelf.category,
        query=shelf.query.query,
        product_category=shelf.query.product_category,
        title=_title(rng, shelf, [shelf.title_attributes[a] for a in attributes if a != hidden]),
        description=rng.choice(rng.choice(shelf.descriptions)),
        bullet_points=tuple(bullet_points),
        attributes=attributes,
        options={
            name: rng.choice(rng.choice(values))
            for name, values in shelf.option_values.items()
            if rng.random() < _OFFERED
        },
        pricing=pricing,
        price_tag=price_tag(pricing),
        instruction=_instruction(shelf, wanted) if wanted else None,
        instruction_attributes=wanted,
    )


def _title(rng: random.Random, shelf: _Shelf, attributes: list[str]) -> str:
    """Brand first; the rest in any order, but for a model at the end."""
    least, most = _TITLE_WORDS
    needed = 2 + shelf.title_kind.count(" ") + 2 * len(attributes)
    filling = min(max(least - needed, rng.randrange(_FILLING + 1)), most - needed)
    model = [rng.choice(shelf.models)] if filling and rng.random() < 0.3 else []
    parts = [shelf.title_kind, *attributes, *rng.choice(shelf.words[filling - len(model)])]
    rng.shuffle(parts)
    return " ".join([rng.choice(shelf.brands), *parts, *model])


def _pricing(rng: random.Random, least: int, greatest: int) -> tuple[float, ...]:
    """One price, or two. The product of two uniform numbers makes low prices more frequent, as they are in WebShop."""
    dollars = least + int((greatest - least + 1) * rng.random() * rng.random())
    price = float(f"{dollars}.{rng.choice(_CENTS)}")
    if rng.random() >= _RANGES:
        return (price,)
    return price, float(f"{dollars + 1 + rng.randrange(10)}.{rng.choice(_CENTS)}")


def _instruction(shelf: _Shelf, attributes: Sequence[str]) -> str:
    """In the grammar of WebShop's own: 'Find me easy clean coffee tables with solid wood, tempered glass for living room'."""
    named: dict[Place, list[str]] = {"before": [], "with": [], "for": []}
    for attribute in attributes:
        named[shelf.place[attribute]].append(attribute)
    parts = ["Find me", ", ".join(named["before"]), shelf.query.query]
    parts += [f"{place} {', '.join(named[place])}" for place in ("with", "for") if named[place]]
    return " ".join(part for part in parts if part)


def asin_of(index: int, first: int) -> str:
    """Looks random, yet maps indices below ASINS one to one: multiplying by numbers coprime to ASINS and swapping halves do."""
    number = (index * 1_743_392_200_993 + first) % ASINS
    number = (number % _HALF * _HALF + number // _HALF) * 1_078_465_118_903 % ASINS
    high, low = divmod(number, _HALF)
    pairs = len(_PAIRS)
    return f"B0{_PAIRS[high // pairs]}{_PAIRS[high % pairs]}{_PAIRS[low // pairs]}{_PAIRS[low % pairs]}"
