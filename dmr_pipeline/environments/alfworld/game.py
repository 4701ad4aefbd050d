"""An ALFWorld game: what stands where, and what is asked for. Read from official files, or made by the generator.

The engine's names and orders are kept (seen in alfworld 0.4.2): things are listed in sorted order of their lower-cased PDDL
ids, and numbers within a type are given out from the highest down, so that a listing reads "cabinet 3, cabinet 2, cabinet 1".
"""

import random
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import PlainSerializer

from dmr_pipeline.environments.base import Demonstration
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
