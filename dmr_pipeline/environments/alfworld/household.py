"""What stands where in ALFWorld's rooms: counts over games.

`household.json` is `count_household` of the 3,553 games of the official train split: facts that were counted, no text of the
official data. The generator (to make games in the official proportions) and the exploring expert (to search likely places
first) read it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files

from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.frozen_model import FrozenModel

Histogram = dict[int, float]
"""Number in a room -> share of the rooms."""
ROOMS = ("kitchen", "livingroom", "bedroom", "bathroom")


class Household(FrozenModel):
    receptacles: dict[str, dict[str, Histogram]]
    """Room -> receptacle kind -> how many there are."""
    openable: dict[str, float]
    """Receptacle kind -> share that can be opened (and starts closed); kinds left out never can."""
    shares_place: dict[str, dict[str, float]]
    """Receptacle kind -> kind of a receptacle listed before it -> share that stands at that one's place."""
    things: dict[str, dict[str, Histogram]]
    """Room -> thing kind -> how many there are, where the task is not about that kind."""
    wanted: dict[str, Histogram]
    """Task type -> how many there are of the kind that the task is about."""
    stands_in: dict[str, dict[str, dict[str, int]]]
    """Room -> thing kind -> receptacle kind -> times seen there."""
    together: dict[str, float]
    """Thing kind -> share that stands where the one listed before it does, among those with one of their kind before them."""
    may_contain: dict[str, frozenset[str]]
    """Receptacle kind -> thing kinds that can be put there."""
    abilities: dict[str, frozenset[str]]
    """Thing kind -> what can be done with it."""
    tasks: dict[str, dict[str, int]]
    """Task type -> room -> games."""
    targets: dict[str, list[tuple[str, str, str, int]]]
    """Task type -> (room, thing kind, receptacle or lamp kind, games)."""


def room_of(game: Game) -> str:
    """Official games do not name their room, but its receptacles tell: right for all 3,693 whose floor plan is known."""
    kinds = {receptacle.kind for receptacle in game.receptacles}
    for kind, room in (("fridge", "kitchen"), ("toilet", "bathroom"), ("bed", "bedroom")):
        if kind in kinds:
            return room
    return "livingroom"


def count_household(games: Iterable[Game]) -> Household:
    receptacles: dict[str, list[Counter[str]]] = defaultdict(list)
    things: dict[str, list[tuple[Counter[str], str]]] = defaultdict(list)
    wanted: dict[str, list[int]] = defaultdict(list)
    stands_in: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    openable: dict[str, list[bool]] = defaultdict(list)
    shares_place: dict[str, Counter[str]] = defaultdict(Counter)
    together: dict[str, list[bool]] = defaultdict(list)
    may_contain: dict[str, set[str]] = defaultdict(set)
    abilities: dict[str, set[str]] = defaultdict(set)
    tasks: dict[str, Counter[str]] = defaultdict(Counter)
    targets: dict[str, Counter[tuple[str, str, str]]] = defaultdict(Counter)
    for game in games:
        room, goal = room_of(game), game.goal
        tasks[game.task_type][room] += 1
        targets[game.task_type][room, goal.kind, goal.receptacle_kind or goal.lamp or ""] += 1
        receptacles[room].append(Counter(receptacle.kind for receptacle in game.receptacles))
        first_at: dict[int, str] = {}
        for receptacle in game.receptacles:
            openable[receptacle.kind].append(receptacle.openable)
            if receptacle.place in first_at:
                shares_place[receptacle.kind][first_at[receptacle.place]] += 1
            first_at.setdefault(receptacle.place, receptacle.kind)
        standing = [thing for thing in game.things if thing.inside and thing.kind]
        counted = Counter(thing.kind for thing in standing)
        wanted[game.task_type].append(counted.pop(goal.kind, 0))
        things[room].append((counted, goal.kind))
        for one, thing in zip((None, *standing), standing, strict=False):
            abilities[thing.kind] |= thing.abilities
            for where in thing.inside:
                stands_in[room][thing.kind][game.receptacles[where].kind] += 1
            if one is not None and one.kind == thing.kind:
                together[thing.kind].append(one.inside == thing.inside)
        for receptacle_kind, thing_kind in game.may_contain:
            may_contain[receptacle_kind].add(thing_kind)
    return Household(
        receptacles={
            room: {kind: _histogram(c[kind] for c in counts) for kind in sorted({k for c in counts for k in c})}
            for room, counts in _sorted(receptacles)
        },
        openable={kind: share for kind, seen in _sorted(openable) if (share := _share(seen))},
        shares_place={
            kind: {other: round(times / len(openable[kind]), 4) for other, times in _sorted(seen)}
            for kind, seen in _sorted(shares_place)
        },
        things={
            room: {
                kind: _histogram(c[kind] for c, goal_kind in counts if goal_kind != kind)
                for kind in sorted({k for c, _ in counts for k in c})
            }
            for room, counts in _sorted(things)
        },
        wanted={task: _histogram(numbers) for task, numbers in _sorted(wanted)},
        stands_in={
            room: {kind: dict(_sorted(where)) for kind, where in _sorted(seen)} for room, seen in _sorted(stands_in)
        },
        together={kind: share for kind, seen in _sorted(together) if (share := _share(seen))},
        may_contain={kind: frozenset(may) for kind, may in _sorted(may_contain)},
        abilities={kind: frozenset(can) for kind, can in _sorted(abilities)},
        tasks={task: dict(_sorted(rooms)) for task, rooms in _sorted(tasks)},
        targets={task: [(*what, games) for what, games in _sorted(seen)] for task, seen in _sorted(targets)},
    )


def _sorted(counts: Mapping) -> list[tuple]:
    return sorted(counts.items())


def _share(seen: list[bool]) -> float:
    return round(sum(seen) / len(seen), 4)


def _histogram(numbers: Iterable[int]) -> Histogram:
    counts = Counter(numbers)
    return {number: round(times / counts.total(), 4) for number, times in sorted(counts.items())}


@cache
def household() -> Household:
    return Household.model_validate_json((files(__package__) / "household.json").read_text(encoding="utf-8"))


@cache
def search_order(thing_kind: str) -> tuple[str, ...]:
    """Receptacle kinds in the order in which it pays to look for a thing: chance of finding it there, per step it takes.

    A kind's chance is shared among as many receptacles as a room that has the kind holds on average; looking into one that
    can be opened takes two steps.
    """
    table = household()

    def mean_count(kind: str) -> float:
        histograms = [room[kind] for room in table.receptacles.values() if kind in room]
        present = sum(share for h in histograms for n, share in h.items() if n > 0)
        return sum(n * share for h in histograms for n, share in h.items()) / present if present else 1.0

    def value(kind: str, seen: int) -> float:
        return seen / mean_count(kind) / (2 if table.openable.get(kind, 0.0) > 0.5 else 1)

    seen_in: Counter[str] = Counter()
    for room in table.stands_in.values():
        seen_in.update(room.get(thing_kind, {}))
    return tuple(sorted(seen_in, key=lambda kind: (-value(kind, seen_in[kind]), kind)))
