"""The shop and the goals of a recipe: made once by the stage `benchmark_tasks`, read by every later stage."""

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from dmr_pipeline.environments.task_files import read_tasks, write_tasks
from dmr_pipeline.environments.webshop.catalogue import draw_prices, open_shop, read_pricing, write_shop, write_terms
from dmr_pipeline.environments.webshop.expert import ShoppingExpert
from dmr_pipeline.environments.webshop.generator import generate_products
from dmr_pipeline.environments.webshop.goals import PUBLISHED_SPLITS, Goal, Goals, ShoppingTask
from dmr_pipeline.environments.webshop.nouns import DESCRIPTIONS, NounTagger, installed_tagger
from dmr_pipeline.environments.webshop.official.packing import official_shop
from dmr_pipeline.errors import UserError

if TYPE_CHECKING:
    from dmr_pipeline.environments.webshop.benchmark import GeneratedWebShop, OfficialWebShop, WebShop

SHOP_FOLDER = "shop"
_PUBLISHED = {"agent_train": "train", "router_train": "train", "validation": "eval", "test": "test"}


@dataclass(frozen=True)
class Catalogue:
    """Products that have been written, and what the rest of their shop is made with."""

    description: str
    seed: int
    """Of prices and price limits."""
    tagger: NounTagger = "alphabetic"
    human: bool = False
    """Goals are in people's own words."""


def generated_catalogue(settings: "GeneratedWebShop", folder: Path) -> Catalogue:
    count = write_shop(generate_products(settings.products, settings.seed), folder)
    return Catalogue(f"{count} generated products", settings.seed)


def official_catalogue(settings: "OfficialWebShop", folder: Path) -> Catalogue:
    """The packed catalogue, copied into the folder.

    Raises:
        UserError: the official catalogue is not packed.
    """
    tagger = installed_tagger() if settings.nouns == "installed" else settings.nouns
    packed, pack = official_shop()
    shutil.copytree(packed, folder, ignore=shutil.ignore_patterns("pack.json"), dirs_exist_ok=True)
    description = f"{pack.products} products of WebShop ({pack.name}), {settings.goals} goals"
    return Catalogue(description, settings.price_seed, tagger, human=settings.goals == "human")


def all_goals(folder: Path, catalogue: Catalogue) -> tuple[Goals, dict[str, str]]:
    """Make the shop of the products in `folder`; all its goals, in WebShop's order, and what a report should say of them."""
    rng = random.Random(catalogue.seed)
    write_terms(draw_prices(read_pricing(folder), rng), catalogue.tagger, folder)
    goals = Goals(open_shop(folder), rng, human=catalogue.human)
    return goals, {
        "catalogue": f"{catalogue.description}; prices drawn with seed {catalogue.seed}",
        "nouns": DESCRIPTIONS[catalogue.tagger],
    }


def deal_goals(
    goals: Sequence[Goal], settings: "WebShop", folder: Path
) -> dict[str, tuple[list[Goal], dict[str, JsonValue]]]:
    """The goals of each split, from the published ranges. A goal that even its own product does not satisfy in full, a quirk
    of WebShop's reward, is dropped from the training splits, and only from these.

    Raises:
        UserError: there are fewer goals than a split asks for.
    """
    shop = open_shop(folder / SHOP_FOLDER)
    dropped = 0

    def satisfiable(goal: Goal) -> bool:
        nonlocal dropped
        can_be = ShoppingExpert(ShoppingTask(goal, shop)).can_be_satisfied()
        dropped += not can_be
        return can_be

    left: dict[str, Iterator[Goal]] = {
        name: (goals[i] for i in range(len(goals))[part]) for name, part in PUBLISHED_SPLITS.items()
    }
    left["train"] = filter(satisfiable, left["train"])
    dealt: dict[str, tuple[list[Goal], dict[str, JsonValue]]] = {}
    for split, published in _PUBLISHED.items():
        wanted, before = getattr(settings.splits, split), dropped
        chosen = list(islice(left[published], wanted))
        if len(chosen) < wanted:
            raise UserError(
                f"benchmark.splits.{split}: {wanted} goals, but WebShop's {published} split has {len(chosen)} left: ask for"
                " fewer, or use a larger catalogue"
            )
        facts: dict[str, JsonValue] = {"published_split": published}
        if published == "train":
            facts["unsatisfiable_goals_dropped"] = dropped - before
        dealt[split] = chosen, facts
    return dealt


def write_goals(goals: list[Goal], path: Path) -> None:
    """One row a goal."""
    write_tasks(goals, path, column="goal")


def read_shopping_tasks(folder: Path, split: str, limit: int | None = None) -> list[ShoppingTask]:
    shop = open_shop(folder / SHOP_FOLDER)
    return [ShoppingTask(goal, shop) for goal in read_tasks(Goal, folder / f"{split}.parquet", limit, column="goal")]


def webshop_texts(folder: Path) -> list[str]:
    """Texts that together hold every word of titles, options and instructions, and all the asins and prices. Words of
    descriptions and bullet points are left out: they are many, and few episodes read them."""
    shop = open_shop(folder / SHOP_FOLDER)
    texts = [
        "WebShop [SEP] Instruction: [SEP] Search search[ click[ ]",
        "Page 1 (Total results: 50) Rating: N.A. Price:",
    ]
    texts += ["Back to Search < Prev Next > Description Features Reviews Buy Now find me with for and to , :"]
    texts += [f"price lower than {limit:.2f} dollars" for limit in range(10, 1000, 10)]
    texts += [f"{page} (Total results: {total})" for page in range(1, 7) for total in range(51)]
    for row in range(len(shop)):
        product = shop.product(row)
        options = [text for name, values in product.options.items() for text in (name, *values)]
        texts += [product.asin, product.title, product.price_tag, product.query, *options, *product.attributes]
        texts.append(product.instruction or "")
        texts += [human.instruction for human in product.human_instructions]
    return texts
