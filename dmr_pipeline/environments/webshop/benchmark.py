"""WebShop, its catalogue generated here or the official one."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, JsonValue

from dmr_pipeline.environments.benchmark import Benchmark, split_summary
from dmr_pipeline.recipe.benchmark import Games
from dmr_pipeline.recipe.fields import Seed, StepLimit, at_most

if TYPE_CHECKING:
    from dmr_pipeline.environments.webshop.goals import Goals, ShoppingTask
    from dmr_pipeline.environments.webshop.tasks import Catalogue

SEARCH = "search["
"""What the command of a search starts with."""
_GOALS = (
    re.compile(r"(?:goal|fixed|webshop)[\W_]*0*(\d{1,18})"),
    re.compile(r"(?:session|task|index|idx)[\W_]*0*(\d{1,18})|(?:^|/)(\d{1,18})(?=/|$)"),
)
"""Ways to name a goal; the second, which could be another number, only where the first is not there."""
_GOAL = re.compile(r"goal-(\d{1,18})")


class WebShop(Games):
    """WebShop, whoever made the catalogue. Splits are as published: of the shuffled goals, test has its games from 0 to 499,
    validation from 500 to 1,499, agent_train and router_train from the rest."""

    step_limit: StepLimit = Field(15, description="steps an episode may take; 15 is the norm for LLM agents")

    def problems(self) -> Iterator[tuple[str, str]]:
        for split, there in (("test", 500), ("validation", 1000)):
            if (wanted := getattr(self.splits, split)) > there:
                yield f"splits.{split}", f"{wanted:,} games, but WebShop's published split has {there:,}"


class GeneratedWebShop(WebShop):
    """Goals in a catalogue made by the generator."""

    environment: Literal["webshop"] = "webshop"
    products: Annotated[int, Field(gt=0), at_most(2_000_000, "WebShop itself has 1.18 million")] = Field(
        1000,
        description="products in the generated catalogue",
    )


class OfficialWebShop(WebShop):
    """Goals in the official catalogue, packed by `dmr data webshop`."""

    environment: Literal["webshop-official"] = "webshop-official"
    goals: Literal["synthetic", "human"] = Field(
        "synthetic", description="synthetic: one for each combination of a product's options; human: people's own words"
    )
    price_seed: Seed = Field(1, description="of the prices, which WebShop draws unseeded")
    nouns: Literal["installed", "spacy", "alphabetic"] = Field(
        "installed",
        description="nouns of titles, for the reward: spaCy's en_core_web_sm as in WebShop, or every word of letters;"
        " installed: spaCy where its model is installed. The report says which",
    )


W = TypeVar("W", bound=WebShop)


class ShoppingBenchmark(Benchmark[W]):
    task_types = ("beauty", "electronics", "fashion", "garden", "grocery")
    exact_words = True
    step_kinds: ClassVar[Mapping[str, str]] = {"search": SEARCH}

    @abstractmethod
    def make_catalogue(self, folder: Path) -> "Catalogue":
        """Write the products of the shop into `folder`."""

    def make_shop(self, folder: Path) -> tuple["Goals", dict[str, str]]:
        """Write the shop into `folder`; all its goals, in WebShop's order, and what a report should say of them.

        Raises:
            UserError: the official catalogue is not packed.
        """
        from dmr_pipeline.environments.webshop.tasks import SHOP_FOLDER, all_goals

        return all_goals(folder / SHOP_FOLDER, self.make_catalogue(folder / SHOP_FOLDER))

    def make_tasks(self, folder: Path) -> dict[str, Any]:
        from dmr_pipeline.environments.webshop.tasks import deal_goals, write_goals

        goals, facts = self.make_shop(folder)
        summary: dict[str, Any] = {"goals": len(goals), **facts}
        for split, (dealt, split_facts) in deal_goals(goals, self.settings, folder).items():
            write_goals(dealt, folder / f"{split}.parquet")
            summary[split] = split_summary([goal.task_type for goal in dealt], **split_facts)
        return summary

    def read_tasks(self, folder: Path, split: str, limit: int | None = None) -> Sequence["ShoppingTask"]:
        from dmr_pipeline.environments.webshop.tasks import read_shopping_tasks

        return read_shopping_tasks(folder, split, limit)

    def texts(self, folder: Path) -> list[str]:
        from dmr_pipeline.environments.webshop.tasks import webshop_texts

        return webshop_texts(folder)

    def notes(self, summary: Mapping[str, JsonValue]) -> list[str]:
        return [
            f"Catalogue of the shop: {summary['catalogue']}.",
            f"Nouns of the titles, which rewards compare: {summary['nouns']}.",
        ]

    @classmethod
    def names_in(cls, text: str) -> list[str]:
        """By the goal's index, or by the session that asks for it."""
        found = next((numbers for way in _GOALS if (numbers := way.findall(text))), [])
        return [f"goal-{int(''.join(number))}" for number in found]

    @classmethod
    def held_out(cls, name: str) -> str | None:
        """In a published split that nobody trains on."""
        from dmr_pipeline.environments.webshop.goals import published_split

        goal = _GOAL.fullmatch(name)
        split = "train" if goal is None else published_split(int(goal[1]))
        return None if split == "train" else f"WebShop's published split {split}"


class GeneratedShop(ShoppingBenchmark[GeneratedWebShop]):
    section = GeneratedWebShop

    def make_catalogue(self, folder: Path) -> "Catalogue":
        from dmr_pipeline.environments.webshop.tasks import generated_catalogue

        return generated_catalogue(self.settings, folder)


class OfficialShop(ShoppingBenchmark[OfficialWebShop]):
    section = OfficialWebShop

    def make_catalogue(self, folder: Path) -> "Catalogue":
        from dmr_pipeline.environments.webshop.tasks import official_catalogue

        return official_catalogue(self.settings, folder)
