"""An ALFWorld game: what stands where, and what is asked for. Read from official files, or made by the generator.

The engine's names and orders are kept (seen in alfworld 0.4.2): things are listed in sorted order of their lower-cased PDDL
ids, and numbers within a type are given out from the highest down, so that a listing reads "cabinet 3, cabinet 2, cabinet 1".
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError

from dmr_pipeline.errors import UserError

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


class _Fact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Receptacle(_Fact):
    name: str
    kind: str
    place: int
    """Receptacles with the same place are reached by one `go to`."""
    openable: bool


class Thing(_Fact):
    """An object that can stand in a receptacle."""

    name: str
    kind: str
    inside: tuple[int, ...]
    """Indices of the receptacles that it stands in at the start: one, but a few official games name two."""
    abilities: _Set[Literal["pickupable", "cleanable", "heatable", "coolable", "sliceable", "toggleable", "receptacle"]]


class Goal(_Fact):
    """The goal formulas of the six official task types, as fields.

    With `lamp`: an object of `kind` is held while a toggled lamp stands where the agent is. Otherwise: `count` objects of
    `kind` stand in one receptacle of `receptacle_kind`, one of them in every state of `states`.
    """

    kind: str
    receptacle_kind: str | None = None
    count: int = 1
    states: _Set[Literal["clean", "hot", "cool", "sliced"]] = frozenset()
    lamp: str | None = None


class Game(_Fact):
    """One game. Receptacles and things are in the engine's order."""

    task_id: str
    task_type: TaskType
    instruction: str
    receptacles: tuple[Receptacle, ...]
    things: tuple[Thing, ...]
    may_contain: _Set[tuple[str, str]]
    """Pairs (receptacle kind, thing kind) that `move` admits."""
    goal: Goal
    put_wording: Literal["move", "put"] = "move"
    """Grammars since ALFWorld 0.4 say "move X to Y", older ones "put X in/on Y"."""


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an ALFWorld game ({type(error).__name__}: {error})") from error
    sentence = re.search(r"Your task is to: (.*?)\"", grammar)
    goal_at = problem.find("(:goal")
    if sentence is None or goal_at < 0:
        raise UserError(f"{path}: not an ALFWorld game: it has no {'task sentence' if sentence is None else 'goal'}")
    try:
        return parse_game(
            task_id="/".join(path.parent.parts[-2:]),
            instruction=sentence.group(1).rstrip(". "),
            facts=_FACT.findall(problem[problem.index("(:init") : goal_at]),
            goal=_FACT.findall(problem[goal_at:]),
            put_wording="put" if re.search(r'template :: "put \{o\} in/on', grammar) else "move",
        )
    except (KeyError, StopIteration, ValidationError) as error:
        raise UserError(f"{path}: the problem is incomplete ({type(error).__name__}: {error})") from error


def parse_game(
    task_id: str,
    instruction: str,
    facts: list[tuple[str, str, str]],
    goal: list[tuple[str, str, str]],
    put_wording: Literal["move", "put"],
) -> Game:
    """A game from PDDL facts `(predicate, first, second)` of its initial state and its goal formula."""
    receptacle_kind = {a: _kind(b) for predicate, a, b in facts if predicate == "receptacleType"}
    thing_kind = {a: _kind(b) for predicate, a, b in facts if predicate == "objectType"}
    place_of = {a: b for predicate, a, b in facts if predicate == "receptacleAtLocation"}
    openable = {a for predicate, a, _ in facts if predicate == "openable"}
    inside: dict[str, list[str]] = {}
    for predicate, a, b in facts:
        if predicate == "inReceptacle":
            inside.setdefault(a, []).append(b)
    abilities: dict[str, set[str]] = {thing: set() for thing in thing_kind}
    for predicate, a, _ in facts:
        if predicate in _ABILITIES and a in abilities:
            abilities[a].add(_ABILITIES[predicate])
    places = {name: i for i, name in enumerate(sorted(set(place_of.values())))}
    order = engine_order(set(receptacle_kind) | set(thing_kind))
    receptacles = [(i, name) for i, name in order if i in receptacle_kind and i in place_of]
    index = {identifier: n for n, (identifier, _) in enumerate(receptacles)}
    return Game.model_validate(
        {
            "task_id": task_id,
            "task_type": _task_type(goal),
            "instruction": instruction,
            "receptacles": [
                {"name": name, "kind": receptacle_kind[i], "place": places[place_of[i]], "openable": i in openable}
                for i, name in receptacles
            ],
            "things": [
                {"name": name, "kind": thing_kind[i], "inside": where, "abilities": abilities[i]}
                for i, name in order
                if i in thing_kind and (where := [index[r] for r in inside.get(i, ()) if r in index])
            ],
            "may_contain": {(_kind(a), _kind(b)) for predicate, a, b in facts if predicate == "canContain"},
            "goal": _goal(goal),
            "put_wording": put_wording,
        }
    )


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
