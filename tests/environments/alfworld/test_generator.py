"""Generated games: reproducible, solvable by exploring, and in about the official proportions."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.expert import ExploringExpert, ParsedGoal, read_sentence
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import SENTENCES, expert_wins, generate_game
from dmr_pipeline.environments.alfworld.household import count_household, household, room_of, search_order
from dmr_pipeline.environments.alfworld.official import distributions

GAMES = [generate_game(seed)[0] for seed in range(300)]


def test_a_seed_gives_the_same_game_again() -> None:
    assert generate_game(7) == generate_game(7)
    assert generate_game(7)[0] != generate_game(8)[0]


def test_equal_games_have_equal_bytes_in_every_process() -> None:
    """The order of a set of strings changes with the hash seed that a process draws."""
    program = (
        "from dmr_pipeline.environments.alfworld.generator import generate_game;"
        "print(*(generate_game(seed)[0].model_dump_json() for seed in range(5)))"
    )
    written = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert written[0] == written[1]
    assert written[0]


def test_the_exploring_expert_solves_every_generated_game() -> None:
    assert all(expert_wins(game, 50) for game in GAMES)


def test_no_game_is_won_at_the_start() -> None:
    assert not any(AlfWorldEpisode(game).won() for game in GAMES)


def test_task_types_come_in_the_official_proportions() -> None:
    official = {task: sum(rooms.values()) for task, rooms in household().tasks.items()}
    assert sum(official.values()) == 3553
    counts = Counter(game.task_type for game in GAMES)
    for task, games in official.items():
        assert abs(counts[task] / len(GAMES) - games / 3553) < 0.06, task


def test_things_stand_where_they_were_seen() -> None:
    for game in GAMES:
        seen = household().stands_in[room_of(game)]
        for thing in game.things:
            assert game.receptacles[thing.inside[0]].kind in seen[thing.kind]


def test_what_is_wanted_does_not_start_where_it_is_to_be_brought() -> None:
    for game in GAMES:
        at_the_goal = [
            thing
            for thing in game.things
            if thing.kind == game.goal.kind and game.receptacles[thing.inside[0]].kind == game.goal.receptacle_kind
        ]
        assert not at_the_goal


def test_counting_by_hand() -> None:
    """Two desks at one place, on the second two books; one drawer."""
    game = Game.model_validate(
        {
            "task_id": "t",
            "task_type": "pick_and_place_simple",
            "instruction": "put a book in drawer",
            "receptacles": [
                {"name": "bed 1", "kind": "bed", "place": 0, "openable": False},
                {"name": "desk 2", "kind": "desk", "place": 1, "openable": False},
                {"name": "desk 1", "kind": "desk", "place": 1, "openable": False},
                {"name": "drawer 1", "kind": "drawer", "place": 2, "openable": True},
            ],
            "things": [
                {"name": "book 2", "kind": "book", "inside": [2], "abilities": ["pickupable"]},
                {"name": "book 1", "kind": "book", "inside": [2], "abilities": ["pickupable"]},
                {"name": "pen 2", "kind": "pen", "inside": [1], "abilities": ["pickupable"]},
                {"name": "pen 1", "kind": "pen", "inside": [2], "abilities": ["pickupable"]},
            ],
            "may_contain": [["drawer", "book"]],
            "goal": {"kind": "book", "receptacle_kind": "drawer"},
        }
    )
    counted = count_household([game])
    assert counted.receptacles["bedroom"]["desk"] == {2: 1.0}
    assert counted.shares_place == {"desk": {"desk": 0.5}}
    assert counted.openable == {"drawer": 1.0}
    assert counted.wanted == {"pick_and_place_simple": {2: 1.0}}
    assert counted.things["bedroom"] == {"pen": {2: 1.0}}
    assert counted.stands_in["bedroom"] == {"book": {"desk": 2}, "pen": {"desk": 2}}
    assert counted.together == {"book": 1.0}
    assert counted.targets == {"pick_and_place_simple": [("bedroom", "book", "drawer", 1)]}


def test_comparing_games_with_themselves_and_with_others() -> None:
    same = distributions.numbers(GAMES[:40], GAMES[:40])
    assert {row.measure for row in same} == set(distributions.MEASURES)
    assert all(row.distance == 0 and row.official == row.generated for row in same)
    assert all(spread.distance == 0 for spread in distributions.shares(GAMES[:40], GAMES[:40]))
    kitchens, bathrooms = ([game for game in GAMES if room_of(game) == room][:15] for room in ("kitchen", "bathroom"))
    apart = {row.measure: row for row in distributions.numbers(kitchens, bathrooms) if row.room == "all"}
    assert apart["receptacles"].distance > 0.9
    assert apart["receptacles"].official[0] == pytest.approx(sum(len(game.receptacles) for game in kitchens) / 15)
    spreads = {spread.what: spread for spread in distributions.shares(kitchens, bathrooms)}
    assert spreads["room"].official == {"kitchen": 1.0}
    assert spreads["room"].distance == 1.0


@pytest.mark.parametrize(("task", "sentences"), SENTENCES.items())
def test_the_expert_reads_every_sentence_of_the_grammar(task: str, sentences: tuple[str, str]) -> None:
    for sentence in sentences:
        wish = read_sentence(sentence.format(thing="mug", target="desk"))
        assert (wish.kind, wish.target) == ("mug", "desk")
        assert wish.count == (2 if "two" in task else 1)
        assert wish.light == ("look" in task)
        assert (wish.state is not None) == any(word in task for word in ("clean", "heat", "cool"))
    with pytest.raises(ValueError, match="not a task sentence"):
        read_sentence("make me a sandwich")


def test_a_wish_for_a_state_is_not_taken_for_a_kind() -> None:
    assert read_sentence("put a clean mug in cabinet") == ParsedGoal("mug", "cabinet", state="clean")
    assert read_sentence("cool some pan and put it in stoveburner") == ParsedGoal("pan", "stoveburner", state="cool")


def test_likely_places_come_first() -> None:
    assert search_order("towel")[0] == "towelholder"
    assert search_order("pot")[0] == "stoveburner"


def test_the_expert_knows_only_what_it_was_told() -> None:
    """Two games that look alike so far get the same command, wherever the object really is."""
    game = next(game for game in GAMES if game.task_type == "pick_and_place_simple")
    elsewhere = game.model_copy(update={"things": tuple(reversed(game.things))})
    commands = []
    for one in (game, elsewhere):
        expert = ExploringExpert(one.instruction)
        expert.observe(None, AlfWorldEpisode(one).reset())
        commands.append(expert.act())
    assert commands[0] == commands[1]
