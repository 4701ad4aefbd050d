"""The comparison with recorded episodes finds what differs; and, where the authors' files are, that nothing does."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dmr_pipeline.cli import app
from dmr_pipeline.environments.webshop.engine import WebShopEpisode
from dmr_pipeline.environments.webshop.goals import Goal, ShoppingTask
from dmr_pipeline.environments.webshop.official import verify
from dmr_pipeline.errors import UserError
from tests.helpers import needs

Steps = list[dict[str, Any]]
WALK = ["search[mug]", "click[next >]", "click[b000000011]", "click[blue]", "think[hm]", "search[lamp mug]"]
WALK += ["click[b000000007]", "click[features]", "click[< prev]", "click[buy now]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authors' files, of products of two kinds."""
    folder = tmp_path_factory.mktemp("data")
    products = [
        {
            "asin": f"B{number:09d}",
            "name": f"{'Lamp' if number == 7 else 'Mug'} with number {number}",
            "category": "garden",
            "query": "Mugs",
            "product_category": "Home › Kitchen",
            "full_description": "For tea.",
            "small_description": ["Big", "Round"],
            "pricing": "$5.00 to $9.00" if number % 2 else "$7.50",
            "customization_options": {"Color": [{"value": "Red"}, {"value": "Blue"}]},
        }
        for number in range(12)
    ]
    extras = {p["asin"]: {"attributes": ["for tea"], "instruction": f"Find me {p['name']}"} for p in products}
    for extra in extras.values():
        extra["instruction_attributes"] = ["for tea", "heavy"]
    (folder / "items_shuffle_1000.json").write_text(json.dumps(products))
    (folder / "items_ins_v2_1000.json").write_text(json.dumps(extras))
    return folder


@pytest.fixture(scope="module")
def world(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[verify.Shop, list[Goal]]:
    return verify.recorded_shop(data, tmp_path_factory.mktemp("shop") / "shop")


def record(world: tuple[verify.Shop, list[Goal]], goal_index: int = 0) -> Steps:
    shop, goals = world
    goal = goals[goal_index]
    episode = WebShopEpisode(ShoppingTask(goal, shop))
    seen = {"asin": goal.asin, "instruction_text": goal.instruction, "goal_options": goal.options}
    seen |= {"attributes": list(goal.attributes), "price_upper": goal.price_upper, "weight": goal.weight}

    def page(observation: str) -> dict[str, Any]:
        available = {"has_search_bar": episode.has_search_bar(), "clickables": list(episode.clickables())}
        return {"obs": observation, "avail": available}

    steps = [{"goal_index": goal_index, "goal": seen, **page(episode.reset())}]
    for action in WALK:
        observation, reward, done = episode.step(action)
        steps.append({"action": action, "reward": reward, "done": done, **page(observation)})
    return steps


def compare(world: tuple[verify.Shop, list[Goal]], steps: Steps) -> verify.Comparison:
    return verify.compare(*world, [[verify.RecordedStep.model_validate(step) for step in steps]])


def test_prices_and_goals_are_those_of_python_seeded_with_1_after_one_draw(
    world: tuple[verify.Shop, list[Goal]],
) -> None:
    shop, goals = world
    random.seed(1)
    random.getrandbits(32)
    assert shop.prices == [random.uniform(5.0, 9.0) if number % 2 else 7.5 for number in range(12)]
    assert len(goals) == 24


def test_an_episode_is_equal_to_itself(world: tuple[verify.Shop, list[Goal]]) -> None:
    found = compare(world, record(world))
    assert (found.differences, found.nouns, found.steps, found.episodes) == ([], [], 11, 1)
    assert (found.searches, found.top_10) == (2, 1.0)


def _page(step: int, text: str, instead: str) -> Callable[[Steps], None]:
    def change(steps: Steps) -> None:
        assert text in steps[step]["obs"]
        steps[step]["obs"] = steps[step]["obs"].replace(text, instead)

    return change


def earn(steps: Steps, share: float) -> None:
    """Less, on the receipt too."""
    reward = steps[-1]["reward"]
    assert reward > 0
    assert f"max 1.0) [SEP] {reward} " in steps[-1]["obs"]
    steps[-1]["reward"] = share * reward
    steps[-1]["obs"] = steps[-1]["obs"].replace(f"max 1.0) [SEP] {reward} ", f"max 1.0) [SEP] {share * reward} ")


def _set(step: int, key: str, value: object) -> Callable[[Steps], None]:
    return lambda steps: steps[step].update({key: value})


def _available(step: int, key: str, value: object) -> Callable[[Steps], None]:
    return lambda steps: steps[step]["avail"].update({key: value})


@pytest.mark.parametrize(
    ("change", "kind", "where", "what"),
    [
        (_set(0, "goal_index", 99), "goal", "episode 0", "goal 99, of 24"),
        (lambda steps: steps[0]["goal"].update(price_upper=3.0), "goal", "episode 0", "goal 0 differs in price_upper"),
        (_page(0, "WebShop", "Webshop"), "observation", "step 0", "'WebShop [SEP] Instruct"),
        (_page(3, "Rating", "Ratings"), "observation", "step 3", "Rating: N.A. [SEP]"),
        (_available(0, "has_search_bar", False), "available actions", "step 0", "search bar True, recorded False"),
        (
            _available(3, "clickables", ["back to search", "prev"]),
            "available actions",
            "step 3",
            "'< prev', recorded 'prev'",
        ),
        (_available(5, "clickables", []), "available actions", "step 5", "'back to search', recorded None"),
        (_set(4, "reward", 0.1), "reward", "step 4", "0.0, recorded 0.1"),
        (partial(earn, share=0.7), "reward", "step 10", "0.5, recorded 0.35"),
        (_set(10, "done", False), "done", "step 10", "True, recorded False"),
    ],
)
def test_every_kind_of_difference_is_found(
    world: tuple[verify.Shop, list[Goal]], change: Callable[[Steps], None], kind: str, where: str, what: str
) -> None:
    steps = record(world)
    change(steps)
    found = compare(world, steps)
    (difference,) = found.differences
    assert difference.kind == kind
    assert where in difference.where
    assert what in difference.what
    assert found.nouns == []


@pytest.mark.parametrize("score", [0.0, 0.1, 0.5])
def test_another_kind_of_product_is_counted_apart(world: tuple[verify.Shop, list[Goal]], score: float) -> None:
    steps = record(world)
    earn(steps, score)
    found = compare(world, steps)
    assert found.differences == []
    assert [(noun.kind, noun.where) for noun in found.nouns] == [("reward", "episode 0, step 10")]


def test_recorded_results_stand_in_for_our_search(world: tuple[verify.Shop, list[Goal]]) -> None:
    """A recording whose first page has two products in another order."""
    text = json.dumps(record(world))
    for letters in ("B", "b"):
        text = text.replace(f"{letters}000000001", "swap").replace(f"{letters}000000002", f"{letters}000000001")
        text = text.replace("swap", f"{letters}000000002")
    for number, other in ((1, 2), (2, 1)):
        text = text.replace(f"00{number} [SEP] Mug with number {other}", f"00{number} [SEP] Mug with number {number}")
    steps: Steps = json.loads(text)
    steps[0]["goal"] = record(world)[0]["goal"]
    for step in steps:
        for mine, theirs in (("1 [SEP] $7.5", "1 [SEP] $5.0 to $9.0"), ("2 [SEP] $5.0 to $9.0", "2 [SEP] $7.5")):
            step["obs"] = step["obs"].replace(f"number {mine}", f"number {theirs}")
    found = compare(world, steps)
    assert found.differences == []
    assert (found.searches, found.same_top_10) == (2, 0)


def test_a_recording_of_other_products_differs(world: tuple[verify.Shop, list[Goal]]) -> None:
    steps = json.loads(
        json.dumps(record(world)).replace("B000000007", "B999999999").replace("b000000007", "b999999999")
    )
    found = compare(world, steps)
    assert {difference.kind for difference in found.differences} >= {"observation", "available actions"}
    steps = record(world)
    _page(1, "Total results: 11", "Total results: 5")(steps)
    assert [difference.kind for difference in compare(world, steps).differences][:1] == ["observation"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not a recorded episode"),
        ('[{"obs": "x"}]', "line 2: not a recorded episode.*avail.*Field required"),
        ("[]", "line 2: its first step must have a goal"),
    ],
)
def test_a_damaged_file_is_named(world: tuple[verify.Shop, list[Goal]], tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_text(json.dumps(record(world)) + "\n" + line + "\n")
    with pytest.raises(UserError, match=words):
        verify.read_episodes(path)
    with pytest.raises(UserError, match=r"none.jsonl is missing: name a file of recorded WebShop episodes"):
        verify.read_episodes(tmp_path / "none.jsonl")


def dmr(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["env", "verify", "webshop", *arguments], env={"WEBSHOP_DATA": None})


def test_the_command_names_differences_and_exits_with_1(
    world: tuple[verify.Shop, list[Goal]], data: Path, tmp_path: Path
) -> None:
    episodes = [record(world, index) for index in range(24)]
    path = tmp_path / "episodes.jsonl"
    path.write_text("".join(json.dumps(steps) + "\n" for steps in episodes))
    equal = dmr("--data", str(data), "--episodes", str(path))
    assert (equal.exit_code, equal.stdout.splitlines()[-1]) == (0, "compared 264 differences 0 nouns 0 top10 1.0000")
    for steps in episodes:
        steps[4]["reward"] = 0.3
    (data / "odd.jsonl").write_text("".join(json.dumps(steps) + "\n" for steps in episodes))
    odd = dmr("--data", str(data), "--episodes", "odd.jsonl")
    assert (odd.exit_code, odd.stdout.splitlines()[-1]) == (1, "compared 264 differences 24 nouns 0 top10 1.0000")
    assert odd.stdout.count("step 4: reward: 0.0, recorded 0.3") == 20
    assert "and 4 more" in odd.stdout
    (data / "empty.jsonl").write_text("")
    empty = dmr("--data", str(data), "--episodes", "empty.jsonl")
    assert (empty.exit_code, empty.stdout.splitlines()[-1]) == (1, "compared 0 differences 0 nouns 0 top10 0.0000")


def test_without_data_the_command_exits_with_2() -> None:
    result = dmr("--episodes", "episodes.jsonl")
    assert result.exit_code == 2
    assert "name their folder with --data or $WEBSHOP_DATA" in result.stderr


@needs.webshop_files
def test_the_recorded_episodes_of_the_original_replay_without_a_difference(tmp_path: Path) -> None:
    shop, goals = verify.recorded_shop(needs.WEBSHOP_DATA, tmp_path / "shop")
    assert len(goals) == 6910
    found = verify.compare(shop, goals, verify.read_episodes(needs.WEBSHOP_DATA / "golden_episodes.jsonl"))
    assert (found.differences, found.nouns, found.episodes) == ([], [], 60)
    assert found.steps > 500
    assert found.top_10 >= 0.98
