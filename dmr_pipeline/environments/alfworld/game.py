"""An ALFWorld game: what stands where, and what is asked for. Read from official files, or made by the generator.

The engine's names and orders are kept (seen in alfworld 0.4.2): things are listed in sorted order of their lower-cased PDDL
ids, and numbers within a type are given out from the highest down, so that a listing reads "cabinet 3, cabinet 2, cabinet 1".
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import PlainSerializer, ValidationError

from dmr_pipeline.environments.base import Demonstration
from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel

if TYPE_CHECKING:
    from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
    from dmr_pipeline.environments.alfworld.expert import ExploringExpert

TaskType = Literal[
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
]


_T = TypeVar("_T")
_Set = Annotated[frozenset[_T], PlainSerializer(sorted)]
"""Written in sorted order: the order of a set differs from process to process, and equal games have equal bytes."""


class Receptacle(FrozenModel):
    name: str
    kind: str
    place: int
    """Receptacles with the same place are reached by one `go to`."""
    openable: bool


class Thing(FrozenModel):
    """An object that can stand in a receptacle."""

    name: str
    kind: str
    inside: tuple[int, ...]
    """Indices of the receptacles that it stands in at the start: one, but some official games name two or, for what can
    only be sliced, none."""
    abilities: _Set[Literal["pickupable", "cleanable", "heatable", "coolable", "sliceable", "toggleable", "receptacle"]]
    lying: tuple[int, ...] | None = None
    """Places where it lies, if they are not those of the receptacles that it stands in (in some official games)."""
    starts_cool: bool = False
    """It was in a fridge when the official game was recorded."""
    holds: tuple[str, ...] = ()
    """Names of what lies in it, listed when it is examined."""


class Goal(FrozenModel):
    """The goal formulas of the six official task types, as fields.

    With `lamp`: an object of `kind` is held while a toggled lamp stands where the agent is. Otherwise: `count` objects of
    `kind` stand in one receptacle of `receptacle_kind`, one of them in every state of `states`.
    """

    kind: str
    receptacle_kind: str | None = None
    count: int = 1
    states: _Set[Literal["clean", "hot", "cool", "sliced"]] = frozenset()
    lamp: str | None = None


HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


class Game(FrozenModel):
    """One game. Receptacles and things are in the engine's order."""

    task_id: str
    task_type: TaskType
    instruction: str
    receptacles: tuple[Receptacle, ...]
    things: tuple[Thing, ...]
    may_contain: _Set[tuple[str, str]]
    """Pairs (receptacle kind, thing kind) that `move` admits."""
    goal: Goal
    start: int | None = None
    """Place where the agent stands at the start; None where no receptacle is, as in all official games."""
    put_wording: Literal["move", "put"] = "move"
    """Grammars since ALFWorld 0.4 say "move X to Y", older ones "put X in/on Y"."""
    arrival: Literal["receptacle", "place"] = "receptacle"
    """Grammars since ALFWorld 0.4 say "You arrive at desk 1", older ones "You arrive at loc 7"."""
    place_names: tuple[str, ...] = ()
    """Names of the places, for `arrival` at one."""
    help: str | None = HELP
    """What `help` says; None where the game has no such command (before ALFWorld 0.4)."""

    # What plays games imports them, so it is imported when it is asked for.

    def episode(self) -> "AlfWorldEpisode":
        from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode

        return AlfWorldEpisode(self)

    def expert(self) -> "ExploringExpert":
        from dmr_pipeline.environments.alfworld.expert import ExploringExpert

        return ExploringExpert(self.instruction)

    def demonstration(self, rng: random.Random) -> Demonstration:
        from dmr_pipeline.environments.alfworld.demonstrations import receptacle_shown

        return receptacle_shown(self, rng)


def engine_order(identifiers: Iterable[str]) -> list[tuple[str, str]]:
    """(identifier, name) in listing order: sorted by the lower-cased id, numbered within a kind from the highest down."""
    ordered = sorted(identifiers, key=str.lower)
    left = Counter(_spoken_kind(i) for i in ordered)
    named = []
    for identifier in ordered:
        kind = _spoken_kind(identifier)
        named.append((identifier, f"{kind} {left[kind]}"))
        left[kind] -= 1
    return named


def _spoken_kind(identifier: str) -> str:
    """`Sink_bar_..._SinkBasin` is spoken of as a sinkbasin: a quirk of the official demangler."""
    lowered = identifier.lower()
    return lowered.split("_bar_", 1)[0] + ("basin" if "basin" in lowered else "")


_FACT = re.compile(r"\((\w+)\s+([^\s()]+)(?:\s+([^\s()]+))?\)")
_ABILITIES = {
    "pickupable": "pickupable",
    "cleanable": "cleanable",
    "heatable": "heatable",
    "coolable": "coolable",
    "sliceable": "sliceable",
    "toggleable": "toggleable",
    "isReceptacleObject": "receptacle",
}
_STATES = {"isClean": "clean", "isHot": "hot", "isCool": "cool", "isSliced": "sliced"}


def read_game(path: Path) -> Game:
    """Read an official `game.tw-pddl` file.

    Raises:
        UserError: the file is missing or not such a game; the message says what is wrong with it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem, grammar = content["pddl_problem"], content["grammar"]
        if not isinstance(problem, str) or not isinstance(grammar, str):
            raise TypeError("pddl_problem and grammar must be text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an ALFWorld game ({type(error).__name__}: {error})") from error
    sentence = re.search(r"Your task is to: (.*?)\"", grammar)
    init_at, goal_at = problem.find("(:init"), problem.find("(:goal")
    if sentence is None or init_at < 0 or goal_at < 0:
        missing = "task sentence" if sentence is None else "initial state" if init_at < 0 else "goal"
        raise UserError(f"{path}: not an ALFWorld game: it has no {missing}")
    try:
        return parse_game(
            task_id="/".join(path.parent.parts[-2:]),
            instruction=sentence.group(1).removesuffix("."),
            facts=_FACT.findall(problem[init_at:goal_at]),
            goal=_FACT.findall(problem[goal_at:]),
            put_wording="put" if re.search(r'template :: "put \{o\} in/on', grammar) else "move",
            arrival="place" if "You arrive at {lend.name}" in grammar else "receptacle",
            help=_help(grammar),
        )
    except (KeyError, IndexError, StopIteration, ValidationError) as error:
        raise UserError(f"{path}: the problem is incomplete ({type(error).__name__}: {error})") from error


def _help(grammar: str) -> str | None:
    """What the grammar's `help` action says: a text of its own, or the expansion of a rule."""
    if "action help" not in grammar:
        return None
    if found := re.search(r'action help \{.*?feedback :: "([^#"]*)"', grammar, re.DOTALL):
        return found[1].lstrip("\n")
    rule = re.search(r'"help\.feedback": \[\s*\{\s*"rhs": ("[^"]*")', grammar)
    return None if rule is None else json.loads(rule[1])


def parse_game(
    task_id: str,
    instruction: str,
    facts: list[tuple[str, str, str]],
    goal: list[tuple[str, str, str]],
    **wording: str | None,
) -> Game:
    """A game from PDDL facts `(predicate, first, second)` of its initial state and its goal formula."""
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for predicate, a, b in facts:
        pairs[predicate].append((a, b))
    receptacle_kind = {a: _kind(b) for a, b in pairs["receptacleType"]}
    thing_kind = {a: _kind(b) for a, b in pairs["objectType"]}
    place_of = dict(pairs["receptacleAtLocation"])
    openable = {a for a, _ in pairs["openable"]}
    inside, lying = _grouped(pairs["inReceptacle"]), _grouped(pairs["objectAtLocation"])
    holds = _grouped([(outer, inner) for inner, outer in pairs["inReceptacleObject"]])
    abilities: dict[str, set[str]] = defaultdict(set)
    for predicate, ability in _ABILITIES.items():
        for a, _ in pairs[predicate]:
            abilities[a].add(ability)
    places = {name: i for i, name in enumerate(sorted(set(place_of.values())))}
    # Ids without a type are counted too where names are numbered: a few official games have them.
    names = dict(engine_order({i for _, a, b in facts for i in (a, b) if "_bar_" in i}))
    receptacles = [i for i in names if i in receptacle_kind and i in place_of]
    index = {identifier: n for n, identifier in enumerate(receptacles)}
    starts_cool = {a for a, _ in pairs["isCool"]}

    def thing(i: str) -> dict[str, object] | None:
        stands_in = [index[r] for r in inside.get(i, ()) if r in index]
        lies_at = sorted({places[place] for place in lying.get(i, ()) if place in places})
        if not stands_in and not (lies_at and "sliceable" in abilities[i]):
            return None  # nothing can be done with it
        usual = sorted({places[place_of[receptacles[r]]] for r in stands_in})
        return {
            "name": names[i],
            "kind": thing_kind.get(i, ""),
            "inside": stands_in,
            "abilities": abilities[i],
            "lying": None if lies_at == usual else lies_at,
            "starts_cool": i in starts_cool,
            "holds": [names[inner] for inner in names if inner in holds.get(i, ())],
        }

    return Game.model_validate(
        {
            "task_id": task_id,
            "task_type": _task_type(goal),
            "instruction": instruction,
            "receptacles": [
                {"name": names[i], "kind": receptacle_kind[i], "place": places[place_of[i]], "openable": i in openable}
                for i in receptacles
            ],
            "things": [made for i in names if i not in receptacle_kind and (made := thing(i)) is not None],
            "may_contain": {(_kind(a), _kind(b)) for a, b in pairs["canContain"]},
            "goal": _goal(goal),
            "start": next((places.get(place) for _, place in pairs["atLocation"]), None),
            "place_names": [names[place] for place in places] if wording.get("arrival") == "place" else [],
            **wording,
        }
    )


def _grouped(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for a, b in pairs:
        grouped.setdefault(a, []).append(b)
    return grouped


def _kind(pddl_type: str) -> str:
    return pddl_type.removesuffix("Type").lower()


def _goal(goal: list[tuple[str, str, str]]) -> dict[str, object]:
    kinds = [_kind(b) for predicate, _, b in goal if predicate == "objectType"]
    if any(predicate == "isToggled" for predicate, _, _ in goal):
        lamp = next(
            _kind(b)
            for predicate, a, b in goal
            if predicate == "objectType" and any(p == "isToggled" and x == a for p, x, _ in goal)
        )
        return {"kind": next(kind for kind in kinds if kind != lamp), "lamp": lamp}
    return {
        "kind": kinds[0],
        "receptacle_kind": next(_kind(b) for predicate, _, b in goal if predicate == "receptacleType"),
        "count": len({a for predicate, a, _ in goal if predicate == "objectType"}),
        "states": {_STATES[predicate] for predicate, _, _ in goal if predicate in _STATES},
    }


def _task_type(goal: list[tuple[str, str, str]]) -> str:
    predicates = {predicate for predicate, _, _ in goal}
    if "isToggled" in predicates:
        return "look_at_obj_in_light"
    for predicate, word in (("isClean", "clean"), ("isHot", "heat"), ("isCool", "cool")):
        if predicate in predicates:
            return f"pick_{word}_then_place_in_recep"
    things = {a for predicate, a, _ in goal if predicate == "objectType"}
    return "pick_two_obj_and_place" if len(things) > 1 else "pick_and_place_simple"
