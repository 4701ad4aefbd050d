"""The pages of a small shop as literal texts, and what moves between them."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr_pipeline.environments.vector import TextVectorEnv
from dmr_pipeline.environments.webshop.catalogue import open_shop
from dmr_pipeline.environments.webshop.engine import State, WebShopEpisode
from dmr_pipeline.environments.webshop.goals import ShoppingTask
from tests.helpers.worlds import goal, product, shop

DRESS = product(
    1,
    "Red Cotton Dress",
    description="  A dress of cotton. ",
    bullet_points=("Soft & light", "  ", "Machine wash"),
    attributes=("machine wash",),
    options={"color": ("red", "navy | white"), "size": ("small", "red", "men's <xl>")},
    pricing=(5.0, 12.5),
)
BARE = product(2, "Bare Dress", query="gowns", category="beauty")
MUGS = [product(number, f"Mug {number}", query="mugs", attributes=("for tea", "large")) for number in range(10, 33)]
PRODUCTS = [DRESS, BARE, *MUGS]
TOP = "Instruction: [SEP] Find me a dress, and price lower than 20.00 dollars [SEP] "
START = f"WebShop [SEP] {TOP}Search"
DRESS_PAGE = (
    f"{TOP}Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] navy | white [SEP] size [SEP] small [SEP] red [SEP] "
    "men's <xl> [SEP] Red Cotton Dress [SEP] Price: $5.0 to $12.5 [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] "
    "Reviews [SEP] Buy Now"
)
FOUND = f"{TOP}Back to Search [SEP] Page 1 (Total results: 1) [SEP] Next > [SEP] "
FOUND += "B000000001 [SEP] Red Cotton Dress [SEP] $5.0 to $12.5"


def receipt(asin: str, options: str, score: str) -> str:
    return (
        "Thank you for shopping with us! [SEP] Your code: [SEP] None [SEP] (Paste it in your MTurk interface.) [SEP] "
        f"Purchased [SEP] asin [SEP] {asin} [SEP] options [SEP] {options} [SEP] attrs [SEP] None [SEP] category [SEP] None "
        "[SEP] query [SEP] None [SEP] product category [SEP] None [SEP] Target [SEP] asin [SEP] options [SEP] attrs [SEP] "
        "price upper [SEP] instuction text [SEP] category [SEP] product category [SEP] query [SEP] Goal [SEP] None [SEP] "
        f"Reward [SEP] Your score (min 0.0, max 1.0) [SEP] {score} [SEP] Reward Details [SEP] None"
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ShoppingTask:
    opened = shop(PRODUCTS, tmp_path_factory.mktemp("shop"))
    return ShoppingTask(goal(DRESS, attributes=("machine wash",), options={"size": "small"}), opened)


def walk(task: ShoppingTask, *commands: str) -> WebShopEpisode:
    episode = WebShopEpisode(task)
    episode.reset()
    for command in commands:
        episode.step(command)
    return episode


def test_an_episode_page_by_page(task: ShoppingTask) -> None:
    episode = WebShopEpisode(task)
    sub_page = f"{TOP}Back to Search [SEP] < Prev"
    assert episode.first_observation() == START
    assert episode.has_search_bar()
    assert episode.clickables() == ("search",)
    assert episode.admissible_commands() == ("search[a dress]",)
    for command, page in (
        (
            "search[Cotton DRESSES]",
            FOUND.replace("results: 1", "results: 2") + " [SEP] B000000002 [SEP] Bare Dress [SEP] $9.99",
        ),
        ("search[cotton]", FOUND),
        ("click[B000000001]", DRESS_PAGE),
        ("click[description]", f"{sub_page} [SEP] A dress of cotton."),
        ("click[< prev]", DRESS_PAGE),
        ("click[Features]", f"{sub_page} [SEP] Soft & light [SEP]  [SEP] Machine wash"),
        ("click[< prev]", DRESS_PAGE),
        ("click[reviews]", sub_page),
        ("click[small]", sub_page),
        ("click[< prev]", DRESS_PAGE),
        ("click[small]", DRESS_PAGE),
        ("click[navy | white]", DRESS_PAGE),
    ):
        assert episode.step(command) == (page, 0.0, False), command
        assert not episode.has_search_bar()
    bought = receipt("B000000001", '{"color": "navy | white", "size": "small"}', "1.0")
    assert episode.step("click[Buy Now]") == (bought, 1.0, True)
    assert episode.clickables() == ()
    with pytest.raises(RuntimeError, match="call reset"):
        episode.step("click[search]")
    assert episode.reset() == START


def test_what_can_be_clicked(task: ShoppingTask) -> None:
    assert walk(task, "search[cotton]").clickables() == ("back to search", "next >", "b000000001")
    item = walk(task, "search[cotton]", "click[b000000001]")
    buttons = ("back to search", "< prev", "description", "features", "reviews", "buy now")
    assert item.clickables() == (*buttons, "red", "navy | white", "small", "men's <xl>")
    assert item.admissible_commands() == tuple(sorted(f"click[{text}]" for text in item.clickables()))
    item.step("click[features]")
    assert item.clickables() == ("back to search", "< prev")


@pytest.mark.parametrize(
    "command", ["", "look", "click[nothing]", "click[]", "search[]", "think[cotton]", "click[buy now", "click[search]"]
)
def test_other_actions_change_nothing(task: ShoppingTask, command: str) -> None:
    for commands, page in (
        ((), START),
        (("search[cotton]",), FOUND),
        (("search[cotton]", "click[b000000001]"), DRESS_PAGE),
    ):
        assert walk(task, *commands).step(command) == (page, 0.0, False)


def test_ten_products_a_page_and_empty_pages_past_the_end(task: ShoppingTask) -> None:
    episode = walk(task, "search[mug]")

    def page(number: int, numbers: range) -> str:
        previous = "< Prev [SEP] " if number > 1 else ""
        rows = "".join(f" [SEP] B0000000{n} [SEP] Mug {n} [SEP] $9.99" for n in numbers)
        return f"{TOP}Back to Search [SEP] Page {number} (Total results: 23) [SEP] {previous}Next >{rows}"

    assert episode.observation() == page(1, range(10, 20))
    for number, numbers in ((2, range(20, 30)), (3, range(30, 33)), (4, range(0))):
        assert episode.step("click[next >]")[0] == page(number, numbers)
    episode.step("click[< prev]")
    episode.step("click[b000000031]")
    # Back from a product to the page that it was on; a product of another page cannot be clicked there.
    assert episode.step("click[< prev]")[0] == page(3, range(30, 33))
    assert episode.step("click[b000000012]")[0] == page(3, range(30, 33))
    assert episode.step("click[back to search]")[0] == START


def test_a_search_on_any_page_and_the_way_back_forget_product_and_options(task: ShoppingTask) -> None:
    episode = walk(task, "search[cotton]", "click[b000000001]", "click[small]", "click[features]")
    assert episode.step("search[cotton]")[0] == FOUND
    assert episode.state == walk(task, "search[cotton]").state
    for command in ("click[b000000001]", "click[small]", "click[< prev]", "click[b000000001]"):
        episode.step(command)
    assert "options [SEP] {} [SEP]" in episode.step("click[buy now]")[0]


def test_of_equal_values_the_last_name_counts_and_html_is_escaped_on_the_receipt(task: ShoppingTask) -> None:
    episode = walk(task, "search[cotton]", "click[b000000001]", "click[red]")
    assert episode.step("click[buy now]")[0].startswith(receipt("B000000001", '{"size": "red"}', "")[:200])
    episode = walk(task, "search[cotton]", "click[b000000001]", "click[men's <xl>]")
    assert '[SEP] {"size": "men\\u0027s \\u003cxl\\u003e"} [SEP]' in episode.step("click[buy now]")[0]


ODD = product(
    1,
    " ",
    description="\n ",
    bullet_points=("a", "", "  ", "\n", "\xa0"),
    attributes=("cotton", ""),
    options={
        "color": ("buy now", "description", "attributes", "search", "next >", "< prev", "back to search"),
        " ": ("x", "", "a[b]"),
    },
)
ODD_PAGE = (
    f"{TOP}Back to Search [SEP] < Prev [SEP] color [SEP] buy now [SEP] description [SEP] attributes [SEP] search [SEP] "
    "next > [SEP] < prev [SEP] back to search [SEP]  [SEP] x [SEP] a[b] [SEP]  [SEP] Price: $9.99 [SEP] Rating: N.A. [SEP] "
    "Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
)


def test_blank_titles_and_options_named_like_buttons(tmp_path: Path) -> None:
    """All texts as the original showed them when it was played on this product."""
    task = ShoppingTask(goal(ODD), shop([ODD], tmp_path / "shop"))
    sub_page = f"{TOP}Back to Search [SEP] < Prev"
    episode = walk(task, "search[<q> dresses]")
    assert episode.observation().endswith("Next > [SEP] B000000001 [SEP]  [SEP] $9.99")
    for command, page in (
        ("click[b000000001]", ODD_PAGE),
        ("click[features]", f"{sub_page} [SEP] a [SEP]  [SEP]  [SEP] "),
        ("click[< prev]", ODD_PAGE),
        ("click[description]", sub_page),
        ("click[< prev]", ODD_PAGE),
        (
            "click[attributes]",
            f"{sub_page} [SEP] cotton [SEP]  [SEP] fashion [SEP] dresses [SEP] Clothing › Women › Dresses",
        ),
        ("click[< prev]", ODD_PAGE),
        ("click[search]", ODD_PAGE),
        ("click[a[b]]", ODD_PAGE),
        ("click[next >]", ODD_PAGE),
        ("click[x]", ODD_PAGE),
    ):
        assert episode.step(command) == (page, 0.0, False), command
    buttons = ("back to search", "< prev", "description", "features", "reviews", "buy now")
    assert episode.clickables() == (*buttons, "attributes", "search", "next >", "x", "", "a[b]")
    assert {f"click[{text}]" for text in (*buttons, "attributes", "next >", "x")} == set(episode.admissible_commands())
    assert episode.step("click[buy now]")[0].startswith(
        receipt("B000000001", '{" ": "x", "color": "next \\u003e"}', "")[:200]
    )
    for button, page in (("< prev", "results"), ("back to search", "start")):
        assert walk(task, "search[<q> dresses]", "click[b000000001]", f"click[{button}]").state.page == page


def test_rewards_of_other_purchases(task: ShoppingTask) -> None:
    without_size = walk(task, "search[cotton]", "click[b000000001]")
    assert without_size.step("click[buy now]")[1:] == (pytest.approx(2 / 3), True)
    # 'Dress' of three nouns, and the path of categories: the right kind, within the price limit, but nothing else.
    assert walk(task, "search[bare]", "click[b000000002]").step("click[buy now]")[1] == pytest.approx(1 / 3)
    assert walk(task, "search[mug]", "click[b000000010]").step("click[buy now]")[1] == 0.0


def test_searches_by_attribute_category_and_query(task: ShoppingTask) -> None:
    def rows(words: str) -> tuple[int, ...]:
        return walk(task, f"search[{words}]").state.results

    mugs = tuple(range(2, 25))
    assert rows("<a> for tea") == rows("<q> mugs") == mugs
    assert rows("<a> tea") == rows("<q> mug") == ()
    assert rows("<c> beauty ignored") == (1,)
    assert sorted(rows("<r>")) == list(range(25))
    assert rows("<r>") == rows("<r> words") != tuple(range(25))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 999), max_size=12), st.lists(st.integers(0, 999), min_size=1, max_size=12))
def test_a_kept_state_plays_on_as_the_first_time(task: ShoppingTask, before: list[int], after: list[int]) -> None:
    def play(episode: WebShopEpisode, choices: list[int]) -> list[object]:
        history: list[object] = []
        for choice in choices:
            commands = [*episode.admissible_commands(), "search[mug]", "search[dress cotton]", "look"]
            if episode.state.page == "done":
                episode.reset()
            history.append((episode.step(commands[choice % len(commands)]), episode.clickables()))
        return history

    episode = WebShopEpisode(task)
    play(episode, before)
    kept = pickle.loads(pickle.dumps(episode.state))
    assert isinstance(kept, State)
    assert hash(kept) == hash(episode.state)
    first = play(episode, after)
    episode.state = kept
    assert play(episode, after) == first
    other = WebShopEpisode(task)
    other.state = kept
    assert play(other, after) == first


def test_a_pickled_task_finds_the_shop_that_is_open(task: ShoppingTask) -> None:
    again = pickle.loads(pickle.dumps(task))
    assert again == task
    assert again.shop is task.shop is open_shop(Path(task.shop.folder))
    assert len(pickle.dumps(task)) < 2000


def test_the_vector_environment_ends_an_episode_at_the_step_limit(task: ShoppingTask) -> None:
    env = TextVectorEnv([task], num_envs=2, step_limit=4)
    env.reset(seed=0)
    buying = ["search[cotton]", "click[b000000001]", "click[small]", "click[buy now]"]
    for step, command in enumerate(buying, 1):
        seen, rewards, terminations, truncations, infos = env.step([command, "click[next >]"])
        assert truncations.tolist() == [step == 4] * 2
    assert (rewards.tolist(), terminations.tolist(), infos["won"].tolist()) == ([1, 0], [True, False], [True, False])
    assert seen[0] == receipt("B000000001", '{"size": "small"}', "1.0")
    assert env.step(["", ""])[0] == (START, START)
