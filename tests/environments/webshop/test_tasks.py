"""The shop and the goals that a recipe gets."""

import hashlib
import pickle
from pathlib import Path

import pytest
from pydantic import JsonValue

from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.environments.webshop.catalogue import open_shop
from dmr_pipeline.environments.webshop.tasks import read_shopping_tasks
from dmr_pipeline.errors import UserError
from tests.helpers.shopping import BENCHMARK, make_tasks

PUBLISHED = {"test": range(500), "validation": range(500, 1500)}


def indices(folder: Path, split: str) -> list[int]:
    return [task.goal.index for task in read_shopping_tasks(folder, split)]


def test_splits_are_the_published_ranges_and_share_no_goal(webshop_tasks: Path) -> None:
    assert indices(webshop_tasks, "test") == list(range(20))
    assert indices(webshop_tasks, "validation") == list(range(500, 600))
    train = indices(webshop_tasks, "agent_train") + indices(webshop_tasks, "router_train")
    assert len(set(train)) == 70
    assert min(train) >= 1500


def test_equal_recipes_give_equal_bytes_and_the_seed_another_shop(webshop_tasks: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    make_tasks(BENCHMARK, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(webshop_tasks)
    make_tasks(BENCHMARK.model_copy(update={"seed": 1}), tmp_path / "other")
    other, first = digests(tmp_path / "other"), digests(webshop_tasks)
    assert other.keys() == first.keys()
    for name in ("shop/products.parquet", "shop/prices.parquet", "validation.parquet", "test.parquet"):
        assert other[name] != first[name]


def test_the_summary_says_where_the_catalogue_and_the_nouns_come_from(tmp_path: Path) -> None:
    summary = make_tasks(BENCHMARK, tmp_path / "a").summary
    assert summary["catalogue"] == "600 generated products; prices drawn with seed 0"
    assert summary["nouns"].startswith("every word of letters")
    assert set(summary["validation"]["by_task_type"]) <= set(benchmark_of(BENCHMARK).task_types)
    assert sum(summary["validation"]["by_task_type"].values()) == 100


def test_notes_say_where_the_catalogue_and_the_nouns_come_from() -> None:
    summary: dict[str, JsonValue] = {"nouns": "every word of letters", "catalogue": "generated, 1,000 products"}
    assert benchmark_of(BENCHMARK).notes(summary) == [
        "Catalogue of the shop: generated, 1,000 products.",
        "Nouns of the titles, which rewards compare: every word of letters.",
    ]


def test_more_goals_than_there_are_is_refused(tmp_path: Path) -> None:
    greedy = BENCHMARK.model_copy(update={"splits": BENCHMARK.splits.model_copy(update={"test": 501})})
    with pytest.raises(UserError, match=r"splits.test: 501 goals, but WebShop's test split has 500 left"):
        make_tasks(greedy, tmp_path / "a")


def test_tasks_travel_between_processes_without_their_shop(webshop_tasks: Path) -> None:
    task = read_shopping_tasks(webshop_tasks, "test", 1)[0]
    sent = pickle.dumps(task)
    assert len(sent) < 5_000
    assert pickle.loads(sent).shop is task.shop is open_shop(webshop_tasks / "shop")


def test_what_a_tokenizer_must_know_holds_every_word_of_titles_options_and_instructions(webshop_tasks: Path) -> None:
    words = {word for text in benchmark_of(BENCHMARK).texts(webshop_tasks) for word in text.lower().split()}
    for task in read_shopping_tasks(webshop_tasks, "validation"):
        assert {word.rstrip(",:") for word in task.instruction.lower().split()} <= {word.rstrip(",:") for word in words}
        row = task.shop.row(task.goal.asin)
        assert row is not None
        product = task.shop.product(row)
        assert {product.asin.lower(), *product.title.lower().split(), *product.price_tag.split()} <= words
