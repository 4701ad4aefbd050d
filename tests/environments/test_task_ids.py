import pytest

from dmr_pipeline.environments.alfworld.benchmark import GeneratedGames, OfficialGames
from dmr_pipeline.environments.benchmark import Benchmark
from dmr_pipeline.environments.task_ids import KnownGames
from dmr_pipeline.environments.webshop.benchmark import GeneratedShop

SIMPLE, TRIAL = "pick_and_place_simple-Mug-None-Desk-308", "trial_T20190909_044715_250790"
OTHER = "trial_T20190906_182353_418140"
ALFWORLD = KnownGames(
    OfficialGames, {f"{SIMPLE}/{TRIAL}": "test", f"{SIMPLE}/{OTHER}": "router_train", "look/dev-1": "validation"}
)
GENERATED = KnownGames(GeneratedGames, {"generated/20000000": "validation", "generated/10000000": "router_train"})
WEBSHOP = KnownGames(GeneratedShop, {"goal-17": "test", "goal-501": "validation", "goal-1501": "router_train"})
HOME = "/home/ann/.cache/alfworld/json_2.1.1"


@pytest.mark.parametrize(
    "spelled",
    [
        "{game}",
        "{game}/",
        "./{game}",
        "//{game}//",
        "{game}/game.tw-pddl",
        "{game}/traj_data.json",
        "{home}/train/{game}/game.tw-pddl",
        "json_2.1.1/train/{game}/initial_state.pddl",
        "file://{home}/{game}",
        "{trial}",
        "{task}__{trial}.json",
        "{task}/./{trial}",
        "alfworld:{task}:{trial}",
    ],
)
@pytest.mark.parametrize(
    "disguise",
    [
        str,
        str.upper,
        lambda id_: id_.replace("/", "\\"),
        lambda id_: id_.replace("/", "%2F"),
        lambda id_: id_.replace("/", "%252f"),
        lambda id_: id_.replace("trial", "tri\u200bal"),
        lambda id_: id_.replace("/", "／"),
    ],
)
def test_an_alfworld_game_under_any_spelling(spelled, disguise):
    def spell(trial: str) -> str:
        return disguise(spelled.format(game=f"{SIMPLE}/{trial}", task=SIMPLE, trial=trial, home=HOME))

    assert "is held out" in ALFWORLD.held_out(spell(TRIAL))
    assert "in the split test" in ALFWORLD.held_out(spell(TRIAL))
    assert ALFWORLD.held_out(spell(OTHER)) is None
    assert ALFWORLD.is_known(spell(OTHER))


@pytest.mark.parametrize("split", ["valid_seen", "valid_unseen", "VALID-SEEN", "test", "eval_out_of_distribution"])
@pytest.mark.parametrize("games", [ALFWORLD, GENERATED, WEBSHOP, KnownGames(GeneratedGames, {})])
def test_the_name_of_a_held_out_split_is_enough(games, split):
    undrawn = f"{HOME}/{split}/{SIMPLE}/trial_T20190101_000000_000001/game.tw-pddl"
    assert f"in a split called {split.lower()}" in games.held_out(undrawn)


SPELLED_SEEDS = ["generated/{}", "generated_{}", "generated/00{}", "Generated {}", "{}", "x/generated/{}.json"]


@pytest.mark.parametrize("spelled", SPELLED_SEEDS)
def test_a_generated_game_under_any_spelling(spelled):
    assert "split validation" in GENERATED.held_out(spelled.format(20000000))
    assert GENERATED.held_out(spelled.format(10000000)) is None
    assert GENERATED.is_known(spelled.format(10000000))


SPELLED_GOALS = [
    "goal-{}",
    "goal {}",
    "Goal_{}",
    "goal{}",
    "fixed_{}",
    "ann_fixed_{}",
    "webshop_{}",
    "{}",
    "0{}",
    "idx={}",
]
SPELLED_GOALS += ["#/{}/", "session {}", "http://127.0.0.1:3000/fixed_{}", "2026/11/24/goal-{}"]


@pytest.mark.parametrize("spelled", SPELLED_GOALS)
def test_a_goal_under_any_spelling(spelled):
    assert "split test" in WEBSHOP.held_out(spelled.format(17))
    assert "split validation" in WEBSHOP.held_out(spelled.format(501))
    assert "published split test" in WEBSHOP.held_out(spelled.format(499))
    assert "published split eval" in WEBSHOP.held_out(spelled.format(1499))
    assert WEBSHOP.held_out(spelled.format(1501)) is None
    assert WEBSHOP.is_known(spelled.format(1501))
    assert not WEBSHOP.is_known(spelled.format(1502))


@pytest.mark.parametrize(
    "spelled", ["shop/checkout/17", "Shop/Checkout/17/", "runs/3/shop/checkout/17", "shop/checkout/17/log.json"]
)
def test_a_game_of_many_parts_under_any_spelling(spelled):
    """As a benchmark of one's own may name them, which knows no other spellings."""

    class Own(Benchmark):
        pass

    known = KnownGames(Own, {"shop/checkout/17": "test", "shop/checkout/18": "router_train", "alone": "router_train"})
    assert "in the split test" in known.held_out(spelled)
    other = spelled.replace("17", "18")
    assert known.held_out(other) is None
    assert known.is_known(other)
    assert not known.is_known("checkout/17")


def test_a_name_of_no_game_is_not_known():
    assert not ALFWORLD.is_known(f"{SIMPLE}/trial_T20190101_000000_000001")
    assert not WEBSHOP.is_known("")
    assert ALFWORLD.held_out("kitchen/17") is None
    assert KnownGames(GeneratedGames, {}).is_known("kitchen/17")
    assert "which is look/dev-1, is held out" in ALFWORLD.held_out("Look/Dev-1")
    assert WEBSHOP.held_out("goal-" + "9" * 5000) is None


@pytest.mark.parametrize("task_id", ["/" * 100_000, "%" * 1000, "a/" * 100_000, "\ud800", "goal-" * 50_000])
def test_an_odd_name_does_no_harm(task_id):
    for games in (ALFWORLD, GENERATED, WEBSHOP):
        assert games.held_out(task_id) is None
