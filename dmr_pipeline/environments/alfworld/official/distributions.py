"""Are the generated games like the official ones? Rooms, receptacles, objects, plan lengths and task sentences, side by side."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, pstdev

from scipy.stats import ks_2samp

from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import SENTENCES, expert_steps
from dmr_pipeline.environments.alfworld.household import ROOMS, room_of
from dmr_pipeline.environments.alfworld.planner import shortest_plan


@dataclass(frozen=True)
class Numbers:
    """One measure over the games of one room, or of all."""

    room: str
    measure: str
    official: tuple[float, float]
    """Mean and standard deviation."""
    generated: tuple[float, float]
    distance: float
    """Of Kolmogorov and Smirnov: the largest difference between the two distribution functions, 0 to 1."""


@dataclass(frozen=True)
class Shares:
    """How games are spread over kinds of something."""

    what: str
    official: dict[str, float]
    generated: dict[str, float]
    distance: float
    """Total variation: the share of games that would have to change their kind, 0 to 1."""


def _receptacles(game: Game) -> int:
    return len(game.receptacles)


def _openable(game: Game) -> int:
    return sum(receptacle.openable for receptacle in game.receptacles)


def _places(game: Game) -> int:
    return len({receptacle.place for receptacle in game.receptacles})


def _objects(game: Game) -> int:
    return sum(bool(thing.inside) for thing in game.things)


def _object_kinds(game: Game) -> int:
    return len({thing.kind for thing in game.things if thing.inside})


def _wanted(game: Game) -> int:
    return sum(thing.kind == game.goal.kind for thing in game.things)


def _shortest_plan(game: Game) -> float:
    plan = shortest_plan(game)
    return float("nan") if plan is None else len(plan.commands)


def _exploring_steps(game: Game) -> int:
    """A game that takes more than the step limit counts as one step above it."""
    return expert_steps(game, 50) or 51


MEASURES: dict[str, Callable[[Game], float]] = {
    "receptacles": _receptacles,
    "that can be opened": _openable,
    "places": _places,
    "objects": _objects,
    "kinds of object": _object_kinds,
    "objects of the wanted kind": _wanted,
    "shortest plan": _shortest_plan,
    "steps of the exploring expert": _exploring_steps,
}


def numbers(official: Sequence[Game], generated: Sequence[Game]) -> list[Numbers]:
    """Every measure for every room, then over all rooms."""
    found = []
    values = {
        name: [[(room_of(game), measure(game)) for game in games] for games in (official, generated)]
        for name, measure in MEASURES.items()
    }
    for room in (*ROOMS, "all"):
        for name, pair in values.items():
            ours, theirs = ([value for where, value in side if room in (where, "all")] for side in reversed(pair))
            if ours and theirs:
                distance = float(ks_2samp(theirs, ours).statistic)
                found.append(Numbers(room, name, (mean(theirs), pstdev(theirs)), (mean(ours), pstdev(ours)), distance))
    return found


def shares(official: Sequence[Game], generated: Sequence[Game]) -> list[Shares]:
    """Rooms, task types and the wordings of the task sentence."""
    kinds: dict[str, Callable[[Game], str]] = {
        "room": room_of,
        "task type": lambda game: game.task_type,
        "task sentence": _wording,
    }
    found = []
    for what, kind in kinds.items():
        theirs, ours = (_spread(list(map(kind, games))) for games in (official, generated))
        apart = sum(abs(theirs.get(name, 0.0) - ours.get(name, 0.0)) for name in theirs.keys() | ours.keys()) / 2
        found.append(Shares(what, theirs, ours, apart))
    return found


def _spread(names: list[str]) -> dict[str, float]:
    return {name: count / len(names) for name, count in sorted(Counter(names).items())}


def _wording(game: Game) -> str:
    """The template of the task sentence; the sentence itself where it is none of the generator's."""
    words = {"thing": game.goal.kind, "target": game.goal.receptacle_kind or game.goal.lamp}
    templates = (template for template in SENTENCES[game.task_type] if template.format(**words) == game.instruction)
    return next(templates, game.instruction)
