"""ALFWorld's rules, observation texts and admissible commands, on sets of facts: nothing is parsed or planned in a step."""

from dmr_pipeline.environments.alfworld.game import Game

NOTHING = "Nothing happens."
HELP = """
Available commands:
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
_TREATMENTS = {
    "clean": ("clean", "cleanable", ("sinkbasin", "sink")),
    "heat": ("hot", "heatable", ("microwave",)),
    "cool": ("cool", "coolable", ("fridge",)),
}
_KNIVES = ("knife", "butterknife")


class AlfWorldEpisode:
    """One running episode. Implements `dmr_pipeline.environments.base.Episode`."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self._receptacle = {receptacle.name: i for i, receptacle in enumerate(game.receptacles)}
        self._thing = {thing.name: i for i, thing in enumerate(game.things)}
        self._at: dict[int, list[int]] = {}
        for i, receptacle in enumerate(game.receptacles):
            self._at.setdefault(receptacle.place, []).append(i)
        self.reset()

    def reset(self) -> str:
        self.place: int | None = None
        self.held: int | None = None
        self.opened: set[int] = set()
        self.contents: list[set[int]] = [set() for _ in self.game.receptacles]
        for i, thing in enumerate(self.game.things):
            for receptacle in thing.inside:
                self.contents[receptacle].add(i)
        self.states: dict[str, set[int]] = {
            "clean": set(),
            "hot": set(),
            "cool": set(),
            "sliced": set(),
            "toggled": set(),
        }
        return self._look()

    def step(self, command: str) -> tuple[str, float, bool]:
        observation = self._act(command)
        won = self.won()
        return observation, float(won), won

    def won(self) -> bool:
        goal, game = self.game.goal, self.game
        if goal.lamp is not None:
            return (
                self.held is not None
                and game.things[self.held].kind == goal.kind
                and any(
                    thing in self.states["toggled"] and game.things[thing].kind == goal.lamp
                    for receptacle in self._here()
                    for thing in self.contents[receptacle]
                )
            )
        for i, receptacle in enumerate(game.receptacles):
            if receptacle.kind == goal.receptacle_kind:
                wanted = [thing for thing in self.contents[i] if game.things[thing].kind == goal.kind]
                if len(wanted) >= goal.count and any(
                    all(thing in self.states[state] for state in goal.states) for thing in wanted
                ):
                    return True
        return False

    def admissible_commands(self) -> list[str]:
        game, commands = self.game, ["look", "inventory", "help"]
        for i, receptacle in enumerate(game.receptacles):
            if receptacle.place != self.place:
                commands.append(f"go to {receptacle.name}")
                continue
            commands.append(f"examine {receptacle.name}")
            if receptacle.openable:
                commands.append(f"{'close' if i in self.opened else 'open'} {receptacle.name}")
            if self._reachable(i):
                if self.held is None:
                    commands += [
                        f"take {game.things[t].name} from {receptacle.name}"
                        for t in self.contents[i]
                        if "pickupable" in game.things[t].abilities
                    ]
                elif (receptacle.kind, game.things[self.held].kind) in game.may_contain:
                    commands.append(self._put_command(self.held, i))
            commands += [
                f"use {game.things[t].name}" for t in self.contents[i] if "toggleable" in game.things[t].abilities
            ]
            if self.held is not None:
                for verb, (_, ability, kinds) in _TREATMENTS.items():
                    if receptacle.kind in kinds and ability in game.things[self.held].abilities:
                        commands.append(f"{verb} {game.things[self.held].name} with {receptacle.name}")
                if game.things[self.held].kind in _KNIVES:
                    knife = game.things[self.held].name
                    commands += [
                        f"slice {game.things[t].name} with {knife}"
                        for t in self.contents[i]
                        if "sliceable" in game.things[t].abilities
                    ]
        if self.held is not None:
            commands.append(f"examine {game.things[self.held].name}")
        return sorted(commands)

    def _here(self) -> list[int]:
        return [] if self.place is None else self._at[self.place]

    def _reachable(self, receptacle: int) -> bool:
        return not self.game.receptacles[receptacle].openable or receptacle in self.opened

    def _put_command(self, thing: int, receptacle: int) -> str:
        name, where = self.game.things[thing].name, self.game.receptacles[receptacle].name
        return f"move {name} to {where}" if self.game.put_wording == "move" else f"put {name} in/on {where}"

    def _act(self, command: str) -> str:
        verb, _, rest = command.partition(" ")
        game = self.game
        match verb:
            case "look" if not rest:
                return self._look()
            case "inventory" if not rest:
                return (
                    f"You are carrying: a {game.things[self.held].name}."
                    if self.held is not None
                    else "You are not carrying anything."
                )
            case "help" if not rest:
                return HELP
            case "go":
                target = self._receptacle.get(rest.removeprefix("to "))
                if target is None or game.receptacles[target].place == self.place:
                    return NOTHING
                self.place = game.receptacles[target].place
                return f"You arrive at {game.receptacles[target].name}. {self._examine_receptacle(target)}"
            case "examine":
                if (target := self._receptacle.get(rest)) is not None and target in self._here():
                    return self._examine_receptacle(target)
                if self.held is not None and game.things[self.held].name == rest:
                    return self._examine_thing(self.held)
                return NOTHING
            case "open" | "close":
                target = self._receptacle.get(rest)
                if target is None or target not in self._here() or not game.receptacles[target].openable:
                    return NOTHING
                if (target in self.opened) == (verb == "open"):
                    return NOTHING
                if verb == "close":
                    self.opened.remove(target)
                    return f"You close the {rest}."
                self.opened.add(target)
                return f"You open the {rest}. {self._examine_receptacle(target)}"
            case "take":
                return self._take(*_two(rest, " from "))
            case "move" if game.put_wording == "move":
                return self._put(*_two(rest, " to "))
            case "put" if game.put_wording == "put":
                return self._put(*_two(rest, " in/on "))
            case "clean" | "heat" | "cool":
                return self._treat(verb, *_two(rest, " with "))
            case "use":
                thing = self._thing.get(rest)
                if thing is None or "toggleable" not in game.things[thing].abilities:
                    return NOTHING
                if not any(thing in self.contents[receptacle] for receptacle in self._here()):
                    return NOTHING
                self.states["toggled"].add(thing)
                return f"You turn on the {rest}."
            case "slice":
                return self._slice(*_two(rest, " with "))
        return NOTHING

    def _take(self, name: str, where: str) -> str:
        thing, receptacle = self._thing.get(name), self._receptacle.get(where)
        if thing is None or receptacle is None or self.held is not None or receptacle not in self._here():
            return NOTHING
        if not self._reachable(receptacle) or thing not in self.contents[receptacle]:
            return NOTHING
        if "pickupable" not in self.game.things[thing].abilities:
            return NOTHING
        self.contents[receptacle].remove(thing)
        self.held = thing
        return f"You pick up the {name} from the {where}."

    def _put(self, name: str, where: str) -> str:
        thing, receptacle = self._thing.get(name), self._receptacle.get(where)
        if thing is None or receptacle is None or self.held != thing or receptacle not in self._here():
            return NOTHING
        kinds = (self.game.receptacles[receptacle].kind, self.game.things[thing].kind)
        if not self._reachable(receptacle) or kinds not in self.game.may_contain:
            return NOTHING
        self.contents[receptacle].add(thing)
        self.held = None
        return (
            f"You move the {name} to the {where}."
            if self.game.put_wording == "move"
            else f"You put the {name} in/on the {where}."
        )

    def _treat(self, verb: str, name: str, where: str) -> str:
        thing, receptacle = self._thing.get(name), self._receptacle.get(where)
        if thing is None or receptacle is None or self.held != thing or receptacle not in self._here():
            return NOTHING
        state, ability, kinds = _TREATMENTS[verb]
        if self.game.receptacles[receptacle].kind not in kinds or ability not in self.game.things[thing].abilities:
            return NOTHING
        self.states[state].add(thing)
        if state != "clean":
            self.states["cool" if state == "hot" else "hot"].discard(thing)
        return f"You {verb} the {name} using the {where}."

    def _slice(self, name: str, knife: str) -> str:
        thing, held = self._thing.get(name), self._thing.get(knife)
        if thing is None or held is None or self.held != held or self.game.things[held].kind not in _KNIVES:
            return NOTHING
        if "sliceable" not in self.game.things[thing].abilities:
            return NOTHING
        if not any(thing in self.contents[receptacle] for receptacle in self._here()):
            return NOTHING
        self.states["sliced"].add(thing)
        return f"You sliced the {name} with the {knife}."

    def _look(self) -> str:
        if self.place is None:
            seen = listing([receptacle.name for receptacle in self.game.receptacles])
            return f"You are in the middle of a room. Looking quickly around you, you see {seen}."
        names = [self.game.receptacles[i].name for i in self._here()]
        facing = ", and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
        return f"You are facing the {facing}. Next to it, you see nothing."

    def _examine_receptacle(self, receptacle: int) -> str:
        name = self.game.receptacles[receptacle].name
        if self.game.receptacles[receptacle].openable and receptacle not in self.opened:
            return f"The {name} is closed."
        seen = listing([self.game.things[thing].name for thing in sorted(self.contents[receptacle])])
        if self.game.receptacles[receptacle].openable:
            return f"The {name} is open. In it, you see {seen}."
        return f"On the {name}, you see {seen}."

    def _examine_thing(self, thing: int) -> str:
        name = self.game.things[thing].name
        if "receptacle" in self.game.things[thing].abilities:
            return f"This is a normal {name}. In it, you see nothing."
        clean, hot, cool, sliced = (thing in self.states[s] for s in ("clean", "hot", "cool", "sliced"))
        words = " and ".join(word for word, true in (("hot", hot), ("cool", cool), ("clean", clean)) if true)
        if words == "cool" and not sliced:
            words = "cold"
        if words or sliced:
            return f"This is a {' '.join(filter(None, (words, 'sliced' if sliced else '')))} {name}."
        return f"There's nothing special about {name}."


def _two(text: str, separator: str) -> tuple[str, str]:
    first, _, second = text.partition(separator)
    return first, second


def listing(names: list[str]) -> str:
    """Names as the engine strings them together."""
    if not names:
        return "nothing"
    listed = [f"a {name}" for name in names]
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])}, and {listed[-1]}"
