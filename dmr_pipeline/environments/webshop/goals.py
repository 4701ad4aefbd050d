"""Goals: what a customer asks for. Made from a shop as WebShop makes them, and dealt to splits as its papers do."""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, overload

from dmr_pipeline.environments.base import Demonstration
from dmr_pipeline.environments.webshop.catalogue import Product, Shop
from dmr_pipeline.frozen_model import FrozenModel

if TYPE_CHECKING:
    from dmr_pipeline.environments.webshop.engine import WebShopEpisode
    from dmr_pipeline.environments.webshop.expert import ShoppingExpert

PUBLISHED_SPLITS = {"test": slice(0, 500), "eval": slice(500, 1500), "train": slice(1500, None)}
"""Of the shuffled goals."""
NO_LIMIT = 1_000_000.0
"""Price limit of a goal that has none."""
_SHUFFLE_SEED = 233
_LIMITS = [float(limit) for limit in range(10, 1000, 10)]


class Goal(FrozenModel):
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

    @property
    def task_type(self) -> str:
        return self.category


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
        return self.goal.task_type

    @property
    def instruction(self) -> str:
        return self.goal.instruction

    # What shops for goals imports them, so it is imported when it is asked for.

    def episode(self) -> "WebShopEpisode":
        from dmr_pipeline.environments.webshop.engine import WebShopEpisode

        return WebShopEpisode(self)

    def expert(self) -> "ShoppingExpert":
        from dmr_pipeline.environments.webshop.expert import ShoppingExpert

        return ShoppingExpert(self)

    def demonstration(self, rng: random.Random) -> Demonstration:
        from dmr_pipeline.environments.webshop.demonstrations import results_shown

        return results_shown(self, rng)


def published_split(index: int) -> str:
    """Of a goal, by its place in the shuffled list."""
    return next(split for split, part in PUBLISHED_SPLITS.items() if part.start <= index < (part.stop or index + 1))


class Goals(Sequence[Goal]):
    """All goals of a shop, in WebShop's shuffled order. Each is made when it is asked for: the whole catalogue has millions.

    Args:
        rng: draws the price limits. WebShop draws them, after the prices, from Python's global generator: go on with the
            generator that `draw_prices` has used.
        human: the instructions that people wrote, instead of the synthetic ones with every combination of options.
    """

    def __init__(self, shop: Shop, rng: random.Random, *, human: bool = False) -> None:
        self._shop = shop
        self._sources: list[tuple[int, float, int | None]] = []
        """Row, price limit, and of which human instruction; None: of all combinations of options."""
        self._starts: list[int] = []
        """Of each source, how many goals there are before its own."""
        self._count: Counter[str] = Counter()
        """Of each attribute, how many synthetic goals ask for it."""
        total = 0
        for row in range(len(shop)):
            product = shop.product(row)
            numbers: Sequence[int | None] = [] if product.instruction is None else [None]
            for number in range(len(product.human_instructions)) if human else numbers:
                self._sources.append((row, price_limit(shop.prices[row], rng), number))
                self._starts.append(total)
                total += 1 if human else combinations(product)
                if not human:
                    self._count.update(dict.fromkeys(product.instruction_attributes, combinations(product)))
        self._order = list(range(total))
        random.Random(_SHUFFLE_SEED).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Goal: ...

    @overload
    def __getitem__(self, index: slice) -> list[Goal]: ...

    def __getitem__(self, index: int | slice) -> Goal | list[Goal]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        source = bisect_right(self._starts, self._order[index]) - 1
        row, limit, number = self._sources[source]
        product = self._shop.product(row)
        if number is not None:
            return human_goal(product, limit, number).model_copy(update={"index": index})
        goal = synthetic_goal(product, limit, self._order[index] - self._starts[source])
        weight = sum(1.0 / self._count[attribute] for attribute in goal.attributes) / len(goal.attributes)
        return goal.model_copy(update={"index": index, "weight": weight})


def combinations(product: Product) -> int:
    """Of values, one for each option."""
    return prod(len(values) for values in product.options.values())


def synthetic_goal(product: Product, limit: float, number: int) -> Goal:
    """The goal of one combination of options: number 0 to `combinations` - 1, in the order of `itertools.product` over the
    options' names in sorted order."""
    chosen = {}
    for name in sorted(product.options, reverse=True):
        number, place = divmod(number, len(product.options[name]))
        chosen[name] = product.options[name][place]
    options = dict(sorted(chosen.items()))
    wanted = ", and ".join(f"{name}: {value}" for name, value in options.items())
    text = f"{product.instruction}{' with ' if wanted else ''}{wanted}{_limit_text(limit)}"
    return _goal(product, text, product.instruction_attributes, limit, options)


def human_goal(product: Product, limit: float, number: int) -> Goal:
    human = product.human_instructions[number]
    text = human.instruction.strip(".") + _limit_text(limit)
    return _goal(product, text, human.attributes, limit, human.options)


def price_limit(price: float, rng: random.Random) -> float:
    """The larger of two of the next four tens above the price."""
    above = [limit for limit in _LIMITS if limit > price][:4]
    return max(rng.sample(above, 2)) if len(above) > 1 else NO_LIMIT


def _limit_text(limit: float) -> str:
    return "" if limit == NO_LIMIT else f", and price lower than {limit:.2f} dollars"


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
