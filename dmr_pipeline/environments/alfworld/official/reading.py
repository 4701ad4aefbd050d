"""Official `game.tw-pddl` files, and the PDDL in them."""

import json
import re
from collections import defaultdict
from pathlib import Path

from pydantic import ValidationError

from dmr_pipeline.environments.alfworld.game import Game, engine_order
from dmr_pipeline.errors import UserError

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
