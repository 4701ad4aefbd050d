"""Goals: what a customer asks for. Made from a shop as WebShop makes them, and dealt to splits as its papers do."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from dmr_pipeline.environments.webshop.catalogue import Product, Shop

PUBLISHED_SPLITS = {"test": slice(0, 500), "eval": slice(500, 1500), "train": slice(1500, None)}
"""Of the shuffled goals."""
NO_LIMIT = 1_000_000.0
"""Price limit of a goal that has none."""
_SHUFFLE_SEED = 233
_LIMITS = [float(limit) for limit in range(10, 1000, 10)]


class Goal(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    """In the shuffled list: what papers name a goal by."""
    asin: str
    category: str
    query: str
    name: str
    """Title of the product that the goal was made from."""
    product_category: str
    instruction: str
    attributes: tuple[str, ...]
    price_upper: float
    options: dict[str, str] | tuple[str, ...]
    """Synthetic goals name an option and its value, human ones have values only."""
    weight: float
    """Chance of being drawn, where goals are drawn by weight; not normalised."""

    @property
    def task_id(self) -> str:
        return f"goal-{self.index}"


@dataclass(frozen=True)
class ShoppingTask:
    """A goal in its shop: what an episode is about."""

    goal: Goal
    shop: Shop

    @property
    def task_id(self) -> str:
        return self.goal.task_id

    @property
    def task_type(self) -> str:
        return self.goal.category

    @property
    def instruction(self) -> str:
        return self.goal.instruction


def make_goals(shop: Shop, rng: random.Random, *, human: bool = False) -> list[Goal]:
    """All goals of a shop, in WebShop's shuffled order.

    Args:
        rng: draws the price limits. WebShop draws them, after the prices, from Python's global generator: go on with the
            generator that `draw_prices` has used.
        human: the instructions that people wrote, instead of the synthetic ones with every combination of options.
    """
    make = _human_goals if human else synthetic_goals
    goals = [goal for row in range(len(shop)) for goal in make(shop.product(row), shop.prices[row], rng)]
    if not human:
        count = Counter(attribute for goal in goals for attribute in goal.attributes)
        for i, goal in enumerate(goals):
            weight = sum(1.0 / count[attribute] for attribute in goal.attributes) / len(goal.attributes)
            goals[i] = goal.model_copy(update={"weight": weight})
    random.Random(_SHUFFLE_SEED).shuffle(goals)
    return [goal.model_copy(update={"index": index}) for index, goal in enumerate(goals)]


def synthetic_goals(product: Product, price: float, rng: random.Random) -> Iterator[Goal]:
    if product.instruction is None:
        return
    limit, limit_text = _price_limit(price, rng)
    names = sorted(product.options)
    for values in itertools.product(*(product.options[name] for name in names)):
        options = dict(zip(names, values, strict=True))
        wanted = ", and ".join(f"{name}: {value}" for name, value in options.items())
        text = product.instruction + (f" with {wanted}" if wanted else "") + limit_text
        yield _goal(product, text, product.instruction_attributes, limit, options)


def _human_goals(product: Product, price: float, rng: random.Random) -> Iterator[Goal]:
    for human in product.human_instructions:
        limit, limit_text = _price_limit(price, rng)
        yield _goal(product, human.instruction.strip(".") + limit_text, human.attributes, limit, human.options)


def _price_limit(price: float, rng: random.Random) -> tuple[float, str]:
    """The larger of two of the next four tens above the price, and how an instruction says it."""
    above = [limit for limit in _LIMITS if limit > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    limit = max(rng.sample(above, 2))
    return limit, f", and price lower than {limit:.2f} dollars"


def _goal(
    product: Product, text: str, attributes: Sequence[str], limit: float, options: dict[str, str] | tuple[str, ...]
) -> Goal:
    return Goal(
        index=0,
        asin=product.asin,
        category=product.category,
        query=product.query,
        name=product.title,
        product_category=product.product_category,
        instruction=text,
        attributes=tuple(attributes),
        price_upper=limit,
        options=options,
        weight=1.0,
    )
