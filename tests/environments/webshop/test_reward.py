"""The reward against a second one, written from WebShop's rules, and by hand."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr_pipeline.environments.webshop.catalogue import Product
from dmr_pipeline.environments.webshop.goals import NO_LIMIT, Goal
from dmr_pipeline.environments.webshop.nouns import nouns
from dmr_pipeline.environments.webshop.reward import option_matches, reward, token_set_ratio, type_score
from tests.helpers.worlds import goal, product

NOUNS = nouns("alphabetic")


def matching(first: str, second: str) -> int:
    """Characters in matching blocks (Ratcliff and Obershelp): the longest block, the first of equally long ones, then what is
    left of it and what is right of it."""
    blocks = [
        (-size, i, j)
        for i in range(len(first))
        for j in range(len(second))
        for size in range(1, min(len(first) - i, len(second) - j) + 1)
        if first[i : i + size] == second[j : j + size]
    ]
    if not blocks:
        return 0
    size, i, j = min(blocks)
    return matching(first[:i], second[:j]) - size + matching(first[i - size :], second[j - size :])


def ratio(first: str, second: str) -> int:
    return round(200 * matching(first, second) / (len(first) + len(second)))


def naive_token_set_ratio(first: str, second: str) -> int:
    """As thefuzz 0.19 has it: common tokens, and these with each text's own ones, compared in pairs."""
    cleaned = [
        "".join(c if c.isalnum() or c == "_" else " " for c in text if not 128 <= ord(c) < 256).lower().split()
        for text in (first, second)
    ]
    if not all(cleaned):
        return 0
    mine, theirs = map(set, cleaned)
    common = " ".join(sorted(mine & theirs))
    texts = [f"{common} {' '.join(sorted(own))}".strip() for own in (mine - theirs, theirs - mine)]
    pairs = [(common, texts[0]), (common, texts[1]), texts] if common else [texts]
    return max(ratio(*pair) for pair in pairs)


TEXTS = st.text(alphabet="abtn1_ -é,'’红İΣ", max_size=12)


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS)
def test_the_fuzzy_ratio(first: str, second: str) -> None:
    assert token_set_ratio(first, second) == naive_token_set_ratio(first, second)


@pytest.mark.parametrize(
    ("first", "second", "score"),
    [
        # Of all characters beyond ASCII only those below U+0100 are dropped; others part words, or belong to them.
        ("2’6”x8’", "2'6\"x8'", 100),
        ("café", "caf", 100),
        ("红色", "红色", 100),
        ("红色", "蓝色", 50),
        ("a_b", "a b", 67),
        ("ü", "ü", 0),
        # Blocks in the same order, not the longest common subsequence, which would make it 89.
        ("10x50 hd binoculars", "15x60 hd binoculars", 84),
        # Equal words, of which difflib would take every character for noise.
        ("ab" * 120, "ab" * 120, 100),
    ],
)
def test_ratios_of_thefuzz_by_hand(first: str, second: str, score: int) -> None:
    assert token_set_ratio(first, second) == score


def test_an_option_in_chinese_characters_earns_the_full_reward() -> None:
    bought = product(1, "Silk dress", options={"color": ("红色", "蓝色")})
    wanted = goal(bought, attributes=("silk",), options={"color": "红色"})
    assert reward(bought, 9.99, ["红色"], wanted, NOUNS) == 1.0
    assert reward(bought, 9.99, ["蓝色"], wanted, NOUNS) == pytest.approx(2 / 3)


COLOURS_IN_ORDER = ("black", "brown", "dark", "grey", "red", "tan", "white")
"""Those of WebShop's that the values below can hold."""


def naive_reward(bought: Product, price: float, chosen: Iterable[str], wanted: Goal) -> float:
    def colour(value: str | tuple[str, str]) -> str:
        for known in COLOURS_IN_ORDER:
            if known in value:
                return known
        return str(value)

    def like(first: str, second: str) -> bool:
        return naive_token_set_ratio(first, second) > 85

    texts = [bought.title.lower(), " ".join(bought.bullet_points).lower(), bought.description.lower()]
    points = 1 if wanted.price_upper == NO_LIMIT or price <= wanted.price_upper else 0
    for attribute in wanted.attributes:
        if any(like(own, attribute) for own in bought.attributes) or any(attribute in text for text in texts):
            points += 1
    asked = list(wanted.options.items()) if isinstance(wanted.options, dict) else wanted.options
    for option in asked:
        if any(like(colour(value), colour(option)) for value in chosen):
            points += 1
    ours, theirs = ("".join(c if c.isalpha() else " " for c in t.lower()).split() for t in (bought.title, wanted.name))
    title = sum(word in ours for word in set(theirs)) / len(theirs) if theirs else 0.2
    parts = [{p.strip() for p in path.split("›")} for path in (bought.product_category, wanted.product_category)]
    kind = 1.0
    if not (bought.query == wanted.query or len(parts[0] & parts[1]) >= 2 or title > 0.2):
        kind = 0.5
    if title < 0.1:
        kind = 0.1
    if title == 0.0:
        kind = 0.0
    return kind * points / (len(wanted.attributes) + len(wanted.options) + 1)


WORDS = st.sampled_from("dress gown long linen 3xl tea set of red mug with a big lid and the handle".split())  # noqa: SIM905
TITLES = st.lists(WORDS, max_size=14).map(" ".join)
VALUES = st.sampled_from(
    [
        "red",
        "tank top",
        "1877brown",
        "dark grey",
        "x-large",
        "large",
        "xx large",
        "2 pack",
        "white/black",
        "café",
        "红色",
        "2’6”x8’",
        "2'6\"x8'",
        "color",
    ]
)
PATHS = st.lists(st.sampled_from(["Home", "Kitchen", "Mugs", "Cups"]), min_size=1, max_size=3).map(" › ".join)
ATTRIBUTES = st.lists(st.sampled_from(["machine wash", "hand wash", "long", "for tea", "with lid"]), max_size=3).map(
    tuple
)
PRODUCTS = st.builds(
    lambda title, **fields: product(1, title, **fields),
    TITLES,
    query=st.sampled_from(["mugs", "dresses"]),
    product_category=PATHS,
    attributes=ATTRIBUTES,
    description=TITLES,
    bullet_points=st.lists(TITLES, max_size=2).map(tuple),
)
OPTIONS = st.one_of(
    st.dictionaries(st.sampled_from(["color", "size", "red"]), VALUES, max_size=3),
    st.lists(VALUES, max_size=3).map(tuple),
)


@settings(max_examples=500, deadline=None)
@given(
    PRODUCTS,
    PRODUCTS,
    ATTRIBUTES,
    OPTIONS,
    st.lists(VALUES, max_size=3),
    st.sampled_from([10.0, 20.0, NO_LIMIT]),
    st.sampled_from([9.99, 10.0, 2e6]),
)
def test_the_reward_is_that_of_a_second_implementation(
    bought: Product,
    target: Product,
    attributes: tuple[str, ...],
    options: dict[str, str] | tuple[str, ...],
    chosen: list[str],
    limit: float,
    price: float,
) -> None:
    price = min(price, 999_999.0) if limit == NO_LIMIT else price
    wanted = goal(target, attributes=attributes, options=options, price_upper=limit)
    got = reward(bought, price, chosen, wanted, NOUNS)
    assert got == pytest.approx(naive_reward(bought, price, chosen, wanted))
    assert 0.0 <= got <= 1.0


@pytest.mark.parametrize(
    ("value", "wanted", "matches"),
    [
        ("red", ("color", "red"), True),
        ("x-large", ("size", "x-large"), True),
        ("large", ("size", "x-large"), True),
        ("x-large", ("size", "large"), False),
        ("x-large", "large", True),
        # 86 and 85 of 100.
        ("abcdefgh", "abcdef", True),
        ("abcdefghijklmnopq", "abcdefghijklmnopqrsuvwx", False),
        # A colour inside the chosen value is all that is left of it; inside a synthetic goal's it is not looked for.
        ("tank top", ("style", "tank top"), False),
        ("tank top", "tank top", True),
        ("1877brown", ("style", "1877brown"), False),
        ("1877brown", "dark brown", True),
    ],
)
def test_options_by_hand(value: str, wanted: str | tuple[str, str], matches: bool) -> None:
    assert option_matches(value, wanted) is matches


@pytest.mark.parametrize(
    ("title", "query", "path", "score"),
    [
        ("Tea mug", "gowns", "Garden", 0.0),
        ("Tea mug", "dresses", "Clothing › Women › Dresses", 0.0),
        ("One tea mug", "dresses", "Clothing › Women › Dresses", 0.1),
        ("One two tea mug", "gowns", "Clothing › Men", 0.5),
        ("One two tea mug", "gowns", "Clothing › Women", 1.0),
        ("One two tea mug", "dresses", "Garden", 1.0),
        ("One two three mug", "gowns", "Garden", 1.0),
    ],
)
def test_kinds_by_hand(title: str, query: str, path: str, score: float) -> None:
    """Of eleven words of the goal's title none, one (a share under 0.1), two (0.18) or three."""
    wanted = goal(product(1, "One two three four five six seven eight nine ten eleven"))
    assert type_score(product(2, title, query=query, product_category=path), wanted, NOUNS) == score


def test_a_title_without_nouns_leaves_the_kind_to_query_and_category() -> None:
    wanted = goal(product(1, "123"))
    assert type_score(product(2, "456"), wanted, NOUNS) == 1.0
    assert type_score(product(2, "456", query="mugs", product_category="Garden"), wanted, NOUNS) == 0.5
