"""A hand-written expert that explores as an agent must: it knows the task sentence and what the observations have said."""

import re
from dataclasses import dataclass, field

from dmr_pipeline.environments.alfworld.engine import NOTHING
from dmr_pipeline.environments.alfworld.household import search_order

_NAME = r"([a-z]+ \d+)"
_LISTED = re.compile(rf"an? {_NAME}")
_SHOWN = re.compile(rf"(?:On the {_NAME}, you see|The {_NAME} is open\. In it, you see) (.*?)\.(?:$|\s)")
_CLOSED = re.compile(rf"The {_NAME} is closed\.")
_TREATED_WITH = {"clean": "sinkbasin", "hot": "microwave", "cool": "fridge"}
_VERB = {"clean": "clean", "hot": "heat", "cool": "cool"}


@dataclass(frozen=True)
class ParsedGoal:
    """What a task sentence asks for."""

    kind: str
    target: str
    """Receptacle kind; or the lamp's kind where `light` is set."""
    count: int = 1
    state: str | None = None
    light: bool = False


_SENTENCES = (
    (r"put (?:a|some) (clean|hot|cool) (\w+) (?:in|on) (\w+)", lambda m: ParsedGoal(m[2], m[3], state=m[1])),
    (
        r"(clean|heat|cool) some (\w+) and put it (?:in|on) (\w+)",
        lambda m: ParsedGoal(m[2], m[3], state={"heat": "hot"}.get(m[1], m[1])),
    ),
    (r"(?:put|find) two (\w+) (?:and put them )?(?:in|on) (\w+)", lambda m: ParsedGoal(m[1], m[2], count=2)),
    (r"look at (\w+) under the (\w+)", lambda m: ParsedGoal(m[1], m[2], light=True)),
    (r"examine the (\w+) with the (\w+)", lambda m: ParsedGoal(m[1], m[2], light=True)),
    (r"put (?:a|some) (\w+) (?:in|on) (\w+)", lambda m: ParsedGoal(m[1], m[2])),
)


def read_sentence(sentence: str) -> ParsedGoal:
    """The wish in a task sentence of ALFWorld's grammar.

    Raises:
        ValueError: the sentence is none of the grammar's.
    """
    for pattern, wish in _SENTENCES:
        if match := re.fullmatch(pattern, sentence):
            return wish(match)
    raise ValueError(f"not a task sentence of ALFWorld's grammar: {sentence!r}")


def kind_of(name: str) -> str:
    return name.rpartition(" ")[0]


@dataclass
class ExploringExpert:
    """Searches likely receptacles first, in listing order within a kind; implements `environments.base.Expert`."""

    instruction: str
    wish: ParsedGoal = field(init=False)
    receptacles: list[str] = field(default_factory=list)
    contents: dict[str, set[str]] = field(default_factory=dict)
    """What was last seen in each receptacle that has been looked into."""
    closed: set[str] = field(default_factory=set)
    here: str | None = None
    """The receptacle faced; a neighbour at the same place becomes it when `go to` has no effect."""
    held: str | None = None
    taken_from: str | None = None
    treated: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    """Commands that had no effect since the last one that had."""

    def __post_init__(self) -> None:
        self.wish = read_sentence(self.instruction)

    def observe(self, command: str | None, observation: str) -> None:
        if command is None:
            self.receptacles = _LISTED.findall(observation)
            return
        verb, _, rest = command.partition(" ")
        if observation.startswith(NOTHING):
            self.refused.add(command)
            if verb == "go" and rest.removeprefix("to ") in self.receptacles:
                self.here = rest.removeprefix("to ")
            return
        self.refused.clear()
        if verb == "go":
            self.here = rest.removeprefix("to ")
        elif verb == "take":
            self.held, _, self.taken_from = rest.partition(" from ")
            self.contents.setdefault(self.taken_from, set()).discard(self.held)
        elif verb in ("move", "put"):
            thing, _, where = rest.partition(" to " if verb == "move" else " in/on ")
            self.contents.setdefault(where, set()).add(thing)
            self.held = None
        elif verb in ("clean", "heat", "cool"):
            self.treated.add(rest.partition(" with ")[0])
        elif verb == "close":
            self.closed.add(rest)
        for match in _CLOSED.finditer(observation):
            self.closed.add(match[1])
        for match in _SHOWN.finditer(observation):
            name = match[1] or match[2]
            self.closed.discard(name)
            self.contents[name] = set(_LISTED.findall(match[3]))

    def act(self) -> str:
        wish = self.wish
        if self.held is not None:
            if kind_of(self.held) != wish.kind or self.held in self._delivered():
                return self._put_back()
            if wish.light:
                lamp = self._find(wish.target)
                if lamp is None:
                    return self._explore(wish.target)
                name, where = lamp
                return self._at(where) or f"use {name}"
            if wish.state is not None and self.held not in self.treated:
                appliance = self._first(_TREATED_WITH[wish.state])
                return self._at(appliance) or f"{_VERB[wish.state]} {self.held} with {appliance}"
            goal = self._goal_receptacle()
            return self._at(goal) or self._open(goal) or f"move {self.held} to {goal}"
        found = self._find(wish.kind)
        if found is None:
            return self._explore(wish.kind)
        name, where = found
        return self._at(where) or self._open(where) or f"take {name} from {where}"

    def think(self) -> str:
        """What the next command is about: the thing or receptacle by name, or "<kind> none" while it has not been seen."""
        wish = self.wish
        if self.held is None:
            found = self._find(wish.kind)
            return found[0] if found else f"{wish.kind} none"
        if kind_of(self.held) != wish.kind or self.held in self._delivered():
            return self.held
        if wish.light:
            lamp = self._find(wish.target)
            return lamp[0] if lamp else f"{wish.target} none"
        if wish.state is not None and self.held not in self.treated:
            return self._first(_TREATED_WITH[wish.state])
        return self._goal_receptacle()

    def _first(self, kind: str) -> str:
        """The receptacle of a kind that is listed last, which bears the number 1."""
        return next((name for name in reversed(self.receptacles) if kind_of(name) == kind), self.receptacles[-1])

    def _goal_receptacle(self) -> str:
        """Where to deliver: where something has been delivered before, else the last one listed."""
        delivered = [name for name in self.receptacles if self._holds_delivered(name)]
        return delivered[0] if delivered else self._first(self.wish.target)

    def _holds_delivered(self, receptacle: str) -> bool:
        return kind_of(receptacle) == self.wish.target and any(
            kind_of(thing) == self.wish.kind for thing in self.contents.get(receptacle, ())
        )

    def _delivered(self) -> set[str]:
        """Things that already stand where they are wanted, and count."""
        if self.wish.light:
            return set()
        goal = self._goal_receptacle()
        return {
            thing
            for thing in self.contents.get(goal, ())
            if kind_of(thing) == self.wish.kind and (self.wish.state is None or thing in self.treated)
        }

    def _find(self, kind: str) -> tuple[str, str] | None:
        """A thing of a kind that was seen and does not stand where it is wanted: (thing, receptacle), here first."""
        done = self._delivered() if kind == self.wish.kind else set()
        order = ([self.here] if self.here else []) + self.receptacles
        for receptacle in order:
            for thing in sorted(self.contents.get(receptacle, ())):
                if kind_of(thing) == kind and thing not in done:
                    return thing, receptacle
        return None

    def _at(self, receptacle: str) -> str | None:
        return None if self.here == receptacle else f"go to {receptacle}"

    def _open(self, receptacle: str) -> str | None:
        return f"open {receptacle}" if receptacle in self.closed else None

    def _explore(self, kind: str) -> str:
        """Look into the next receptacle that has not been looked into; start anew once all have been."""
        if self.here is not None and self.here not in self.contents:
            if self.here in self.closed:
                return f"open {self.here}"
            if f"examine {self.here}" not in self.refused:
                return f"examine {self.here}"
        likely = search_order(kind)
        unseen = [
            name for name in self.receptacles if name not in self.contents and f"go to {name}" not in self.refused
        ]
        if not unseen:
            self.contents.clear()
            unseen = [name for name in self.receptacles if name != self.here]
        return "go to " + min(
            unseen, key=lambda name: likely.index(kind_of(name)) if kind_of(name) in likely else len(likely)
        )

    def _put_back(self) -> str:
        """Lay down what is not wanted: here if that works, else where it came from."""
        assert self.held is not None
        if (
            self.here is not None
            and self.here not in self.closed
            and f"move {self.held} to {self.here}" not in self.refused
        ):
            return f"move {self.held} to {self.here}"
        where = self.taken_from or self.receptacles[-1]
        return self._at(where) or self._open(where) or f"move {self.held} to {where}"
