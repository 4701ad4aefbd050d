"""ALFWorld's rules, observation texts and admissible commands: nothing is parsed, planned or translated in a step.

Equal to the official engine (alfworld 0.4.2 on textworld 1.7.0, names not shuffled) in every text and command;
`dmr env verify alfworld --against textworld` compares the two. Its quirks are kept:

- `look` before the first `go to` sees nothing, although the first observation lists every receptacle;
- of things, only the one that is held can be examined: the rule for what stands in an open receptacle never applies;
- there is no `go to` a receptacle that shares the agent's place;
- a thing moved between two receptacles of one place is from then on also seen "next to" them;
- a lamp can be used, and a thing sliced, through the closed door of what it stands in;
- a toggled lamp stays on: using it again turns it on again;
- what lies in a bowl or a box is listed there for ever, wherever it has been carried since;
- things that two receptacles hold are taken from one at a time.
"""

from typing import NamedTuple

from dmr_pipeline.environments.alfworld.game import Game, Thing

NOTHING = "Nothing happens."
TREATMENTS = {
    "clean": ("cleanable", ("sinkbasin", "sink")),
    "heat": ("heatable", ("microwave",)),
    "cool": ("coolable", ("fridge",)),
}
"""Verb -> what a thing must be for it, and the kinds of receptacle that do it (the official domain names both sinks)."""
KNIVES = ("knife", "butterknife")


class State(NamedTuple):
    """All that changes in an episode. Immutable: to clone a state is to keep it, to restore it is to assign it."""

    place: int | None
    """None before the first `go to`."""
    held: int | None
    """The thing in the agent's hand."""
    opened: frozenset[int]
    contents: tuple[tuple[int, ...], ...]
    """For each receptacle, the things in it in listing order."""
    lying: frozenset[tuple[int, int]]
    """(thing, place): where a thing lies, in a receptacle or not."""
    left: frozenset[tuple[int, int]]
    """(thing, receptacle): taken out of it and not put back."""
    clean: frozenset[int] = frozenset()
    hot: frozenset[int] = frozenset()
    cool: frozenset[int] = frozenset()
    sliced: frozenset[int] = frozenset()
    toggled: frozenset[int] = frozenset()


class Action(NamedTuple):
    """What a command does. `target` is the receptacle, or for `slice` the knife; -1 where there is none."""

    verb: str
    thing: int = -1
    target: int = -1


class AlfWorldEpisode:
    """One running episode. Implements `dmr_pipeline.environments.base.Episode`.

    `state` can be kept, compared, hashed, pickled and set at any time.
    """

    def __init__(self, game: Game) -> None:
        self.game = game
        self._at: dict[int, list[int]] = {}
        for i, receptacle in enumerate(game.receptacles):
            self._at.setdefault(receptacle.place, []).append(i)
        self._start = start_state(game)
        # Made once: there are thirty places to go to, and a command apiece in every state.
        self._standing = {"look": Action("look"), "inventory": Action("inventory")}
        if game.help is not None:
            self._standing["help"] = Action("help")
        self._going = [
            (f"go to {receptacle.name}", Action("go", target=i), receptacle.place)
            for i, receptacle in enumerate(game.receptacles)
        ]
        self.reset()

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        self._actions: dict[str, Action] | None = None

    def reset(self) -> str:
        self.state = self._start
        if self._start.place is not None:
            return self._look()
        return _middle_of_a_room(listing([receptacle.name for receptacle in self.game.receptacles]))

    def first_observation(self) -> str:
        """What the official engine says on a reset: a welcome, what `reset` returns, and the task."""
        return f"-= Welcome to TextWorld, ALFRED! =-\n\n{self.reset()}\n\nYour task is to: {self.game.instruction}."

    def step(self, command: str) -> tuple[str, float, bool]:
        action = self.actions().get(command)
        observation = NOTHING if action is None else self._act(action)
        won = self.won()
        return observation, float(won), won

    def admissible_commands(self) -> list[str]:
        return sorted(self.actions())

    def won(self) -> bool:
        goal, game, state = self.game.goal, self.game, self._state
        if goal.lamp is not None:
            return (
                state.held is not None
                and game.things[state.held].kind == goal.kind
                and any(
                    game.things[thing].kind == goal.lamp and thing in state.toggled
                    for receptacle in self._here()
                    for thing in state.contents[receptacle]
                )
            )
        for receptacle, contents in zip(game.receptacles, state.contents, strict=True):
            if receptacle.kind == goal.receptacle_kind:
                wanted = [thing for thing in contents if game.things[thing].kind == goal.kind]
                if len(wanted) >= goal.count and any(
                    all(thing in getattr(state, done) for done in goal.states) for thing in wanted
                ):
                    return True
        return False

    def actions(self) -> dict[str, Action]:
        """What each admissible command does in this state."""
        if self._actions is None:
            self._actions = self._list_actions()
        return self._actions

    def _list_actions(self) -> dict[str, Action]:
        game, state = self.game, self._state
        things, held = game.things, state.held
        found = {command: action for command, action, place in self._going if place != state.place}
        found.update(self._standing)
        for i in self._here():
            receptacle, name = game.receptacles[i], game.receptacles[i].name
            found[f"examine {name}"] = Action("examine", target=i)
            if receptacle.openable:
                verb = "close" if i in state.opened else "open"
                found[f"{verb} {name}"] = Action(verb, target=i)
            for t in state.contents[i]:
                if "toggleable" in things[t].abilities:
                    found[f"use {things[t].name}"] = Action("use", t)
            if not receptacle.openable or i in state.opened:
                if held is None:
                    for t in state.contents[i]:
                        if "pickupable" in things[t].abilities:
                            found[f"take {things[t].name} from {name}"] = Action("take", t, i)
                elif (receptacle.kind, things[held].kind) in game.may_contain:
                    put = (
                        f"move {things[held].name} to {name}"
                        if game.put_wording == "move"
                        else f"put {things[held].name} in/on {name}"
                    )
                    found[put] = Action("put", held, i)
            if held is not None:
                for verb, (ability, kinds) in TREATMENTS.items():
                    if receptacle.kind in kinds and ability in things[held].abilities:
                        found[f"{verb} {things[held].name} with {name}"] = Action(verb, held, i)
        if held is not None:
            found[f"examine {things[held].name}"] = Action("examine", held)
            if things[held].kind in KNIVES:
                for t, place in state.lying:
                    if place == state.place and "sliceable" in things[t].abilities:
                        found[f"slice {things[t].name} with {things[held].name}"] = Action("slice", t, held)
        return found

    def _act(self, action: Action) -> str:
        """Take an action that is admissible; returns the observation."""
        game, state = self.game, self._state
        verb, thing, target = action
        if verb == "look":
            return self._look() if state.place is not None else _middle_of_a_room("nothing")
        if verb == "inventory":
            if state.held is None:
                return "You are not carrying anything."
            return f"You are carrying: a {game.things[state.held].name}."
        if verb == "help":
            assert game.help is not None
            return game.help
        if verb == "examine":
            return self._examine_thing(thing) if thing >= 0 else self._examine_receptacle(target)
        if verb == "go":
            place = game.receptacles[target].place
            self.state = state._replace(place=place)
            where = game.receptacles[target].name if game.arrival == "receptacle" else game.place_names[place]
            return f"You arrive at {where}. {self._examine_receptacle(target)}"
        if verb == "use":
            self.state = state._replace(toggled=state.toggled | {thing})
            return f"You turn on the {game.things[thing].name}."
        if verb == "slice":
            self.state = state._replace(sliced=state.sliced | {thing})
            return f"You sliced the {game.things[thing].name} with the {game.things[target].name}."
        name = game.receptacles[target].name
        if verb == "open":
            self.state = state._replace(opened=state.opened | {target})
            return f"You open the {name}. {self._examine_receptacle(target)}"
        if verb == "close":
            self.state = state._replace(opened=state.opened - {target})
            return f"You close the {name}."
        what = game.things[thing].name
        contents = state.contents[target]
        if verb == "take":
            self.state = state._replace(
                held=thing,
                contents=_replaced(state.contents, target, tuple(t for t in contents if t != thing)),
                lying=state.lying - {(thing, game.receptacles[target].place)},
                left=state.left | {(thing, target)},
            )
            return f"You pick up the {what} from the {name}."
        if verb == "put":
            self.state = state._replace(
                held=None,
                contents=_replaced(state.contents, target, tuple(sorted({*contents, thing}))),
                lying=state.lying | {(thing, game.receptacles[target].place)},
                left=state.left - {(thing, target)},
            )
            if game.put_wording == "move":
                return f"You move the {what} to the {name}."
            return f"You put the {what} in/on the {name}."
        if verb == "clean":
            self.state = state._replace(clean=state.clean | {thing})
        elif verb == "heat":
            self.state = state._replace(hot=state.hot | {thing}, cool=state.cool - {thing})
        elif verb == "cool":
            self.state = state._replace(cool=state.cool | {thing}, hot=state.hot - {thing})
        return f"You {verb} the {what} using the {name}."

    def _here(self) -> list[int]:
        return [] if self._state.place is None else self._at[self._state.place]

    def _look(self) -> str:
        game, state, here = self.game, self._state, self._here()
        facing = _series([game.receptacles[i].name for i in here])
        beside = [
            game.things[thing].name
            for thing, place in sorted(state.lying)
            if place == state.place
            for receptacle in here
            if (thing, receptacle) in state.left
        ]
        return f"You are facing the {facing}. Next to it, you see {listing(beside)}."

    def _examine_receptacle(self, receptacle: int) -> str:
        name, state = self.game.receptacles[receptacle].name, self._state
        openable = self.game.receptacles[receptacle].openable
        if openable and receptacle not in state.opened:
            return f"The {name} is closed."
        seen = listing([self.game.things[thing].name for thing in state.contents[receptacle]])
        return f"The {name} is open. In it, you see {seen}." if openable else f"On the {name}, you see {seen}."

    def _examine_thing(self, thing: int) -> str:
        state, name = self._state, self.game.things[thing].name
        abilities = self.game.things[thing].abilities
        if "receptacle" in abilities:
            return f"This is a normal {name}. In it, you see {listing(list(self.game.things[thing].holds))}."
        clean, sliced = thing in state.clean, thing in state.sliced
        warmth = "hot" if thing in state.hot else "cool" if thing in state.cool else ""
        if warmth == "cool" and not clean and not sliced:
            warmth = "cold"
        words = " and ".join(filter(None, (warmth, "clean" if clean else "")))
        if not words and "toggleable" in abilities and thing in state.toggled:
            return f"This {name} is on."
        words = " ".join(filter(None, (words, "sliced" if sliced else "")))
        return f"This is a {words} {name}." if words else f"There's nothing special about {name}."


def start_state(game: Game) -> State:
    contents: list[list[int]] = [[] for _ in game.receptacles]
    lying: set[tuple[int, int]] = set()
    for i, thing in enumerate(game.things):
        for receptacle in thing.inside:
            contents[receptacle].append(i)
        lying.update((i, place) for place in places_of(game, thing))
    return State(
        place=game.start,
        held=None,
        opened=frozenset(),
        contents=tuple(map(tuple, contents)),
        lying=frozenset(lying),
        left=frozenset(),
        cool=frozenset(i for i, thing in enumerate(game.things) if thing.starts_cool),
    )


def places_of(game: Game, thing: Thing) -> tuple[int, ...]:
    """Where a thing lies at the start."""
    if thing.lying is not None:
        return thing.lying
    return tuple(game.receptacles[receptacle].place for receptacle in thing.inside)


def _replaced(contents: tuple[tuple[int, ...], ...], at: int, new: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return (*contents[:at], new, *contents[at + 1 :])


def _middle_of_a_room(seen: str) -> str:
    return f"You are in the middle of a room. Looking quickly around you, you see {seen}."


def _series(words: list[str]) -> str:
    """Words as the engine strings them together."""
    return ", and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def listing(names: list[str]) -> str:
    """Things as the engine lists them."""
    return _series([f"a {name}" for name in names]) if names else "nothing"
