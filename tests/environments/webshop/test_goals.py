"""Goals made of small shops by hand, and the nouns of titles."""

import random
import sys
import types
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.environments.webshop import nouns
from dmr_pipeline.environments.webshop.catalogue import HumanInstruction, draw_prices
from dmr_pipeline.environments.webshop.goals import NO_LIMIT, PUBLISHED_SPLITS, Goal, Goals, price_limit, synthetic_goal
from dmr_pipeline.errors import UserError
from tests.helpers import needs
from tests.helpers.worlds import product, shop

HUMAN = (
    HumanInstruction("I need a red dress.", ("cotton",), ("red", "xl")),
    HumanInstruction("a dress", (), ()),
)
DRESS = product(
    1,
    "Dress",
    options={"size": ("s", "m"), "color": ("red", "blue", "tan")},
    instruction="Find me a dress",
    instruction_attributes=("cotton", "long"),
    human_instructions=HUMAN,
)
MUG = product(2, "Mug", instruction="Find me a mug", instruction_attributes=("long",))
PRODUCTS = [DRESS, product(3, "Nobody asks for this"), MUG]


def test_synthetic_goals_are_all_combinations_with_names_sorted(tmp_path: Path) -> None:
    goals = Goals(shop(PRODUCTS, tmp_path, [5.0, 5.0, 995.0]), random.Random(0))
    assert [goal.index for goal in goals] == list(range(7))
    assert goals[3].task_id == "goal-3"
    assert Counter(goal.asin for goal in goals) == {DRESS.asin: 6, MUG.asin: 1}
    dresses = [goal for goal in goals if goal.asin == DRESS.asin]
    wanted = {(goal.options["color"], goal.options["size"]) for goal in dresses if isinstance(goal.options, dict)}
    assert wanted == {(color, size) for color in ("red", "blue", "tan") for size in ("s", "m")}
    limit = dresses[0].price_upper
    assert limit in (20.0, 30.0, 40.0)
    for goal in dresses:
        assert isinstance(goal.options, dict)
        assert goal.instruction == (
            f"Find me a dress with color: {goal.options['color']}, and size: {goal.options['size']}, and price lower than "
            f"{limit:.2f} dollars"
        )
        # 'cotton' is in six goals, 'long' in seven.
        assert goal.weight == pytest.approx((1 / 6 + 1 / 7) / 2)
    (mug,) = (goal for goal in goals if goal.asin == MUG.asin)
    assert (mug.instruction, mug.price_upper, mug.options, mug.weight) == ("Find me a mug", NO_LIMIT, {}, 1 / 7)
    assert (mug.name, mug.query, mug.category, mug.attributes) == ("Mug", "dresses", "fashion", ("long",))


def test_human_goals_have_their_own_words_and_values_without_names(tmp_path: Path) -> None:
    goals = Goals(shop(PRODUCTS, tmp_path, [985.0] * 3), random.Random(0), human=True)
    assert {(goal.instruction, goal.attributes, goal.options, goal.weight) for goal in goals} == {
        ("I need a red dress", ("cotton",), ("red", "xl"), 1.0),
        ("a dress", (), (), 1.0),
    }
    assert all(Goal.model_validate_json(goal.model_dump_json()) == goal for goal in goals)


@given(st.floats(0, 1100), st.integers(0, 1000))
def test_the_price_limit_is_the_larger_of_two_of_the_next_four_tens(price: float, seed: int) -> None:
    goal = synthetic_goal(MUG, price_limit(price, random.Random(seed)), 0)
    tens = [ten for ten in range(10, 991, 10) if ten > price][:4]
    if len(tens) < 2:
        assert (goal.price_upper, goal.instruction) == (NO_LIMIT, "Find me a mug")
    else:
        assert goal.price_upper in tens[1:]
        assert goal.instruction == f"Find me a mug, and price lower than {goal.price_upper:.2f} dollars"


def test_goals_are_shuffled_alike_whatever_the_prices_were_drawn_with(tmp_path: Path) -> None:
    mugs = [product(n, f"Mug {n}", instruction="a mug", instruction_attributes=("x",)) for n in range(30)]
    opened = shop(mugs, tmp_path)
    order = list(range(30))
    random.Random(233).shuffle(order)
    for seed in (0, 1):
        assert [int(goal.asin[1:]) for goal in Goals(opened, random.Random(seed))] == order
    limits = [[goal.price_upper for goal in Goals(opened, random.Random(seed))] for seed in (0, 0, 1)]
    assert limits[0] == limits[1] != limits[2]


def test_the_published_splits_are_the_first_500_the_next_1000_and_the_rest() -> None:
    goals = list(range(6910))
    dealt = {name: goals[part] for name, part in PUBLISHED_SPLITS.items()}
    assert dealt == {"test": goals[:500], "eval": goals[500:1500], "train": goals[1500:]}


def test_prices_are_drawn_in_order_where_they_are_ranges() -> None:
    rng = random.Random(7)
    expected = [3.0, rng.uniform(1, 2), 5.0, rng.uniform(10, 20)]
    assert draw_prices([(3.0,), (1.0, 2.0), (5.0,), (10.0, 20.0)], random.Random(7)) == expected


def test_alphabetic_nouns_are_all_words_of_letters() -> None:
    assert nouns.nouns("alphabetic")("2 Red Café-Mugs, 12oz mugs_x") == ["red", "café", "mugs", "oz", "mugs", "x"]


def test_spacy_nouns_are_its_nouns_and_proper_nouns(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"The": "DET", "Red": "ADJ", "IKEA": "PROPN", "mugs": "NOUN"}

    def load(model: str, disable: list[str]) -> object:
        assert model == "en_core_web_sm"
        assert not {"tagger", "tok2vec", "attribute_ruler"} & set(disable)
        return lambda text: [types.SimpleNamespace(text=word, pos_=tags[word]) for word in text.split()]

    nouns._spacy.cache_clear()
    monkeypatch.setattr(nouns, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    assert nouns.installed_tagger() == "spacy"
    assert nouns.nouns("spacy")("The Red IKEA mugs mugs") == ["ikea", "mugs", "mugs"]
    nouns._spacy.cache_clear()


def test_without_spacys_model_nouns_are_alphabetic_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    nouns._spacy.cache_clear()
    monkeypatch.setattr(nouns, "find_spec", lambda _: None)
    assert nouns.installed_tagger() == "alphabetic"
    with pytest.raises(UserError, match=r"spacy download en_core_web_sm.*benchmark\.nouns to alphabetic"):
        nouns.nouns("spacy")


@needs.spacy_model
def test_the_real_model_where_it_is_installed() -> None:
    found = nouns.nouns("spacy")("A red ceramic mug for coffee by Keurig")
    assert {"mug", "coffee"} <= set(found)
    assert not {"a", "for", "by"} & set(found)


def test_goals_are_a_sequence(tmp_path: Path) -> None:
    goals = Goals(shop(PRODUCTS, tmp_path, [5.0, 5.0, 995.0]), random.Random(0))
    assert goals[2:0:-1] == [goals[2], goals[1]]
    assert goals[-1] == list(goals)[-1]
    with pytest.raises(IndexError):
        goals[len(goals)]
