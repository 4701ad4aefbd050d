"""The engine against texts that the official one printed (alfworld 0.4.2 on textworld 1.7.0), and against its own rules."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr_pipeline.environments.alfworld.engine import NOTHING, AlfWorldEpisode
from dmr_pipeline.environments.alfworld.game import Game, Goal, Receptacle, Thing, engine_order
from dmr_pipeline.environments.alfworld.generator import generate_game

FOOD = frozenset({"pickupable", "heatable", "coolable", "cleanable", "sliceable"})


def kitchen(goal: Goal | None = None) -> Game:
    """Part of an official kitchen, in the order in which the official engine lists it."""
    return Game(
        task_id="kitchen",
        task_type="pick_heat_then_place_in_recep",
        instruction="heat some apple and put it in diningtable",
        receptacles=(
            Receptacle(name="cabinet 1", kind="cabinet", place=0, openable=False),
            Receptacle(name="diningtable 2", kind="diningtable", place=1, openable=False),
            Receptacle(name="drawer 2", kind="drawer", place=2, openable=True),
            Receptacle(name="drawer 1", kind="drawer", place=2, openable=True),
            Receptacle(name="fridge 1", kind="fridge", place=3, openable=True),
            Receptacle(name="microwave 1", kind="microwave", place=4, openable=True),
            Receptacle(name="sinkbasin 1", kind="sinkbasin", place=5, openable=False),
        ),
        things=(
            Thing(name="apple 1", kind="apple", inside=(1,), abilities=FOOD),
            Thing(name="bread 3", kind="bread", inside=(1,), abilities=FOOD),
            Thing(name="egg 2", kind="egg", inside=(5,), abilities=FOOD),
            Thing(name="knife 1", kind="knife", inside=(2,), abilities=frozenset({"pickupable", "cleanable"})),
            Thing(name="mug 2", kind="mug", inside=(5,), abilities=frozenset({"pickupable", "receptacle"})),
        ),
        may_contain=frozenset(
            {("diningtable", "apple"), ("diningtable", "bread"), ("fridge", "apple"), ("drawer", "knife")}
        ),
        goal=goal or Goal(kind="apple", receptacle_kind="diningtable", states=frozenset({"hot"})),
    )


def test_texts_of_the_official_engine() -> None:
    episode = AlfWorldEpisode(kitchen())
    said = [
        ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
        ("open microwave 1", "You open the microwave 1. The microwave 1 is open. In it, you see a egg 2, and a mug 2."),
        ("examine microwave 1", "The microwave 1 is open. In it, you see a egg 2, and a mug 2."),
        ("look", "You are facing the microwave 1. Next to it, you see nothing."),
        ("close microwave 1", "You close the microwave 1."),
        ("inventory", "You are not carrying anything."),
        ("go to diningtable 2", "You arrive at diningtable 2. On the diningtable 2, you see a apple 1, and a bread 3."),
        ("take apple 1 from diningtable 2", "You pick up the apple 1 from the diningtable 2."),
        ("inventory", "You are carrying: a apple 1."),
        ("examine apple 1", "There's nothing special about apple 1."),
        ("take bread 3 from diningtable 2", NOTHING),
        ("examine diningtable 2", "On the diningtable 2, you see a bread 3."),
        ("foo", NOTHING),
        ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
        ("heat apple 1 with microwave 1", "You heat the apple 1 using the microwave 1."),
        ("examine apple 1", "This is a hot apple 1."),
        ("go to drawer 1", "You arrive at drawer 1. The drawer 1 is closed."),
        ("open drawer 1", "You open the drawer 1. The drawer 1 is open. In it, you see nothing."),
        ("move apple 1 to drawer 1", NOTHING),
        ("go to cabinet 1", "You arrive at cabinet 1. On the cabinet 1, you see nothing."),
        ("open cabinet 1", NOTHING),
        ("go to diningtable 2", "You arrive at diningtable 2. On the diningtable 2, you see a bread 3."),
    ]
    for command, observation in said:
        assert episode.step(command) == (observation, 0.0, False), command
    assert episode.step("move apple 1 to diningtable 2") == ("You move the apple 1 to the diningtable 2.", 1.0, True)


def test_first_observation_lists_all_receptacles() -> None:
    seen = AlfWorldEpisode(kitchen()).reset()
    assert seen == (
        "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a diningtable 2, a drawer 2, "
        "a drawer 1, a fridge 1, a microwave 1, and a sinkbasin 1."
    )


def test_receptacles_at_one_place_are_reached_together() -> None:
    episode = AlfWorldEpisode(kitchen())
    episode.step("go to drawer 2")
    assert episode.step("go to drawer 1")[0] == NOTHING
    assert "go to drawer 1" not in episode.admissible_commands()
    assert episode.step("open drawer 1")[0].startswith("You open the drawer 1.")


def test_heating_undoes_cooling() -> None:
    episode = AlfWorldEpisode(kitchen(Goal(kind="apple", receptacle_kind="diningtable", states=frozenset({"cool"}))))
    for command in (
        "go to diningtable 2",
        "take apple 1 from diningtable 2",
        "go to fridge 1",
        "cool apple 1 with fridge 1",
    ):
        episode.step(command)
    episode.step("go to microwave 1")
    episode.step("heat apple 1 with microwave 1")
    episode.step("go to diningtable 2")
    assert episode.step("move apple 1 to diningtable 2")[1:] == (0.0, False)


def test_slicing_needs_a_knife_in_hand() -> None:
    episode = AlfWorldEpisode(kitchen())
    episode.step("go to diningtable 2")
    assert episode.step("slice bread 3 with knife 1")[0] == NOTHING
    for command in ("go to drawer 2", "open drawer 2", "take knife 1 from drawer 2", "go to diningtable 2"):
        episode.step(command)
    assert episode.step("slice bread 3 with knife 1")[0] == "You sliced the bread 3 with the knife 1."
    assert "bread" in " ".join(episode.admissible_commands())


def test_two_objects_must_stand_in_one_receptacle() -> None:
    goal = Goal(kind="egg", receptacle_kind="drawer", count=2)
    game = kitchen(goal)
    things = tuple(Thing(name=f"egg {n}", kind="egg", inside=(0,), abilities=FOOD) for n in (2, 1))
    game = game.model_copy(update={"things": things, "may_contain": frozenset({("drawer", "egg")})})
    episode = AlfWorldEpisode(game)
    for drawer in ("drawer 2", "drawer 1"):
        episode.step(f"go to {drawer}")
        episode.step(f"open {drawer}")
    for egg, drawer, won in (("egg 2", "drawer 2", False), ("egg 1", "drawer 1", False)):
        episode.step("go to cabinet 1")
        episode.step(f"take {egg} from cabinet 1")
        episode.step(f"go to {drawer}")
        assert episode.step(f"move {egg} to {drawer}")[2] is won
    episode.step("take egg 1 from drawer 1")
    assert episode.step("move egg 1 to drawer 2")[1:] == (1.0, True)


@given(st.integers(0, 300), st.integers(0, 10))
@settings(max_examples=8, deadline=None)
def test_exactly_the_admissible_commands_do_something(seed: int, walk: int) -> None:
    game, _ = generate_game(seed)
    episode, rng = AlfWorldEpisode(game), random.Random(walk)
    everything = {"look", "inventory", "help"}
    names = [r.name for r in game.receptacles]
    everything |= {f"{verb} {name}" for verb in ("go to", "open", "close", "examine") for name in names}
    for _ in range(6):
        admissible = episode.admissible_commands()
        assert admissible == sorted(set(admissible))
        for command in sorted(everything):
            probe = _copy(episode)
            assert (probe.step(command)[0] != NOTHING) == (command in admissible), command
        for command in admissible:
            assert _copy(episode).step(command)[0] != NOTHING, command
        if episode.step(rng.choice(admissible))[2]:
            break


def _copy(episode: AlfWorldEpisode) -> AlfWorldEpisode:
    twin = AlfWorldEpisode(episode.game)
    twin.state = episode.state
    return twin


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (["Cabinet_bar_1", "Cabinet_bar_2"], ["cabinet 2", "cabinet 1"]),
        (["Sink_bar_1_bar_SinkBasin"], ["sinkbasin 1"]),
        (["Pencil_bar_1", "Pen_bar_1"], ["pen 1", "pencil 1"]),
    ],
)
def test_names_are_numbered_from_the_highest_down(ids: list[str], names: list[str]) -> None:
    assert [name for _, name in engine_order(ids)] == names
