"""Our games as official `game.tw-pddl` files, which the official engine loads.

Domain and grammar are read from the installed `alfworld` package and nothing of them is kept here; the problem is made from
the game's fields.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import combinations, count
from pathlib import Path

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode, places_of
from dmr_pipeline.environments.alfworld.expert import ExploringExpert, kind_of
from dmr_pipeline.environments.alfworld.game import Game, Goal
from dmr_pipeline.errors import UserError

_NAMED_BY_DOMAIN = {"otype": {"knife", "butterknife"}, "rtype": {"sinkbasin", "microwave", "fridge"}}
"""Kinds that must exist in every problem."""
_ABILITY_FOR = {"clean": "cleanable", "hot": "heatable", "cool": "coolable", "sliced": "sliceable"}
_PLACE = "loc"
"""Kind of the places' names."""
_STEP_LIMIT = 200


def write_game(game: Game, path: Path) -> None:
    """Write a game in its own wording; `read_game(path)` is then equal to it, but for `task_id`, which is the path's.

    The walkthrough is what the exploring expert does. Where it does not win there is none, and the file says that the game is
    not solvable.

    Raises:
        UserError: the official engine is not installed.
    """
    walkthrough = _walkthrough(game)
    content = {
        "pddl_domain": _domain(game),
        "grammar": _grammar(game),
        "pddl_problem": _problem(game),
        "solvable": walkthrough is not None,
        "walkthrough": walkthrough,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _official_text(name: str) -> str:
    spec = find_spec("alfworld")  # does not import it, which would make a folder in the home directory
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "official game files need the official domain and grammar, which are not installed: "
            "pip install 'dmr-pipeline[alfworld]' (needs gcc, g++ and make)"
        )
    return (Path(spec.submodule_search_locations[0]) / "data" / name).read_text(encoding="utf-8")


def _domain(game: Game) -> str:
    domain = _official_text("alfred.pddl")
    return domain if game.help is not None else _substituted(domain, r"^\(:action help\b.*?^\)\n", "")


def _grammar(game: Game) -> str:
    grammar = _replaced(_official_text("alfred.twl2"), "UNKNOWN GOAL", game.instruction)
    if game.put_wording == "put":
        grammar = _replaced(grammar, 'template :: "move {o} to {r}"', 'template :: "put {o} in/on {r}"', times=2)
        grammar = _replaced(
            grammar, "You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."
        )
    if game.arrival == "place":
        grammar = _replaced(grammar, "You arrive at {r.name}.", "You arrive at {lend.name}.")
    if game.help is None:
        return _substituted(grammar, r"^action help \{.*?^\}\n?", "")
    return _substituted(
        grammar, r'(?<="help\.feedback": \[)\s*\{\s*"rhs": "[^"]*"', f'{{"rhs": {json.dumps(game.help)}'
    )


def _replaced(text: str, old: str, new: str, times: int = 1) -> str:
    assert text.count(old) == times, old
    return text.replace(old, new)


def _substituted(text: str, pattern: str, new: str) -> str:
    text, times = re.subn(pattern, lambda _: new, text, flags=re.DOTALL | re.MULTILINE)
    assert times == 1, pattern
    return text


def _problem(game: Game) -> str:
    receptacles = {receptacle.name for receptacle in game.receptacles}
    things = {name for thing in game.things for name in (thing.name, *thing.holds)}
    places = _place_names(game)
    free = next(name for number in count(1) if (name := f"{_PLACE} {number}") not in places)
    start = free if game.start is None else places[game.start]
    in_facts = {*receptacles, *things, *places, start}
    ids = _identifiers(in_facts)
    # Numbers are given out among what occurs in facts; these two predicates mean nothing to the rules.
    only_counted = [
        f"({'examined' if kind_of(name) == _PLACE else 'moveable'} {ids[name]})" for name in ids if name not in in_facts
    ]
    return "\n".join(
        [
            "(define (problem game)",
            "(:domain alfred)",
            "(:objects",
            "agent1 - agent",
            *_types(game),
            *(
                f"{ids[name]} - "
                + ("receptacle" if name in receptacles else "location" if kind_of(name) == _PLACE else "object")
                for name in ids
            ),
            ")",
            "(:init",
            f"(atLocation agent1 {ids[start]})",
            *_facts(game, ids, places),
            *only_counted,
            ")",
            f"(:goal (and {_goal(game.goal)}))",
            ")",
        ]
    )


def _types(game: Game) -> Iterator[str]:
    goal = game.goal
    things = {kind for _, kind in game.may_contain} | {thing.kind for thing in game.things}
    receptacles = {kind for kind, _ in game.may_contain} | {receptacle.kind for receptacle in game.receptacles}
    for kind in sorted(filter(None, {*_NAMED_BY_DOMAIN["otype"], *things, goal.kind, goal.lamp})):
        yield f"{kind}Type - otype"
    for kind in sorted(filter(None, {*_NAMED_BY_DOMAIN["rtype"], *receptacles, goal.receptacle_kind})):
        yield f"{kind}Type - rtype"


def _place_names(game: Game) -> list[str]:
    """Where they are never spoken of, any names in the order of the places do."""
    number = max((receptacle.place for receptacle in game.receptacles), default=-1) + 1
    return list(game.place_names) or [f"{_PLACE} {number - place}" for place in range(number)]


def _identifiers(names: Iterable[str]) -> dict[str, str]:
    """Name -> a PDDL id that the official demangler turns into it (`engine_order` says how).

    There is one for every number up to a kind's highest: what bears the lacking ones is nowhere, and only counted.
    """
    highest: Counter[str] = Counter()
    for name in names:
        highest[kind_of(name)] = max(highest[kind_of(name)], int(name.rpartition(" ")[2]))
    return {
        f"{kind} {number}": f"{kind.removesuffix('basin')}_bar_{highest[kind] - number:04}"
        + ("_basin" if kind.endswith("basin") else "")
        for kind in sorted(highest)
        for number in range(highest[kind], 0, -1)
    }


def _facts(game: Game, ids: dict[str, str], places: list[str]) -> Iterator[str]:
    for receptacle in game.receptacles:
        identifier = ids[receptacle.name]
        yield f"(receptacleType {identifier} {receptacle.kind}Type)"
        yield f"(receptacleAtLocation {identifier} {ids[places[receptacle.place]]})"
        if receptacle.openable:
            yield f"(openable {identifier})"
    for receptacle_kind, thing_kind in sorted(game.may_contain):
        yield f"(canContain {receptacle_kind}Type {thing_kind}Type)"
    for thing in game.things:
        identifier = ids[thing.name]
        if thing.kind:
            yield f"(objectType {identifier} {thing.kind}Type)"
        for ability in sorted(thing.abilities):
            yield f"({'isReceptacleObject' if ability == 'receptacle' else ability} {identifier})"
        for where in thing.inside:
            yield f"(inReceptacle {identifier} {ids[game.receptacles[where].name]})"
        for place in sorted(set(places_of(game, thing))):
            yield f"(objectAtLocation {identifier} {ids[places[place]]})"
        for inner in thing.holds:
            yield f"(inReceptacleObject {ids[inner]} {identifier})"
        if thing.starts_cool:
            yield f"(isCool {identifier})"


def _goal(goal: Goal) -> str:
    if goal.lamp is not None:
        return (
            "(exists (?lamp - object ?r - receptacle ?a - agent ?l - location) (and "
            f"(objectType ?lamp {goal.lamp}Type) (toggleable ?lamp) (isToggled ?lamp) "
            "(inReceptacle ?lamp ?r) (receptacleAtLocation ?r ?l) (atLocation ?a ?l))) "
            f"(exists (?o - object ?a - agent) (and (objectType ?o {goal.kind}Type) (holds ?a ?o)))"
        )
    wanted = [f"?o{i}" for i in range(goal.count)]
    variables = " ".join(f"{variable} - object" for variable in wanted)
    terms = [f"(receptacleType ?r {goal.receptacle_kind}Type)"]
    terms += [f"(objectType {one} {goal.kind}Type) (inReceptacle {one} ?r)" for one in wanted]
    terms += [f"(not (= {one} {other}))" for one, other in combinations(wanted, 2)]
    terms += [f"({_ABILITY_FOR[state]} ?o0) (is{state.capitalize()} ?o0)" for state in sorted(goal.states)]
    return f"(exists (?r - receptacle {variables}) (and {' '.join(terms)}))"


def _walkthrough(game: Game) -> list[str] | None:
    """Commands that win the game; None where the expert does not."""
    episode = AlfWorldEpisode(game)
    # The expert says "move" and must be shown all receptacles first; what it does is then said in the game's own words.
    shown = AlfWorldEpisode(game.model_copy(update={"put_wording": "move", "start": None}))
    expert = ExploringExpert(game.instruction)
    expert.observe(None, shown.reset())
    walkthrough: list[str] = []
    for _ in range(_STEP_LIMIT):
        if episode.won():
            return walkthrough
        command = expert.act()
        action = shown.actions().get(command)
        own_words = next((words for words, same in episode.actions().items() if same == action), None)
        if own_words is not None:
            walkthrough.append(own_words)
            episode.step(own_words)
        expert.observe(command, shown.step(command)[0])
    return None
