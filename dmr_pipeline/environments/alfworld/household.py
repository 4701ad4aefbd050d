"""What stands where in ALFWorld's rooms: counts over the 3,553 games of the official train split, in our own form.

`household.json` holds facts that were counted, no text of the official data. Both the generator (to make games in about the
official proportions) and the exploring expert (to search likely places first) read it.
"""

from functools import cache
from importlib.resources import files

from pydantic import BaseModel, ConfigDict

Histogram = dict[int, float]
"""Number in a room -> share of the rooms."""


class Household(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    receptacles: dict[str, dict[str, Histogram]]
    """Room -> receptacle kind -> how many there are."""
    openable: dict[str, float]
    """Receptacle kind -> share that can be opened (and starts closed); kinds left out never can."""
    shares_place: dict[str, float]
    """Receptacle kind -> share that stands at the place of another receptacle."""
    things: dict[str, dict[str, Histogram]]
    """Room -> thing kind -> how many there are."""
    stands_in: dict[str, dict[str, int]]
    """Thing kind -> receptacle kind -> times seen there."""
    may_contain: dict[str, frozenset[str]]
    abilities: dict[str, frozenset[str]]
    tasks: dict[str, dict[str, int]]
    """Task type -> room -> games."""
    targets: dict[str, list[tuple[str, str, str, int]]]
    """Task type -> (room, thing kind, receptacle or lamp kind, games)."""


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

    seen_in = table.stands_in.get(thing_kind, {})
    return tuple(sorted(seen_in, key=lambda kind: (-value(kind, seen_in[kind]), kind)))
