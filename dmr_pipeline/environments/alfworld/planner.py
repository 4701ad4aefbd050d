"""Shortest plans for ALFWorld games by one who knows the whole game.

The search runs in the engine itself, on a copy of the game that is cut down to what can matter.
"""

import heapq
import itertools
import math
from collections import Counter
from typing import Any, NamedTuple

from dmr_pipeline.environments.alfworld.engine import _KNIVES, _TREATMENTS, Action, AlfWorldEpisode, State, start_state
from dmr_pipeline.environments.alfworld.game import Game

_RESULT = {"clean": "clean", "heat": "hot", "cool": "cool"}
_THING_STATES = ("clean", "hot", "cool", "sliced", "toggled")


class Plan(NamedTuple):
    commands: tuple[str, ...]
    shortest: bool
    """Proven; False where the search spent its budget and went on greedily."""


def shortest_plan(game: Game, state: State | None = None, budget: int = 5_000) -> Plan | None:
    """The fewest commands that win from a state (the start by default); None where it can't be won.

    A* that takes a state up again when it finds a shorter way there. The first winning state taken up within `budget`
    expanded states is proven nearest: the bound on what is left (`_Bound`) never exceeds it, a shortest plan can do
    without the commands left out (`_matters`), and the cut-down game has plans as short as the whole (`_cut_down`).
    From then on the states that seem nearest to the goal come first, which ends soon but proves nothing.
    """
    part, root = _cut_down(game, start_state(game) if state is None else state)
    episode, bound = AlfWorldEpisode(part), _Bound(part)
    episode.state = root
    length = {root: 0}
    reached_by: dict[State, tuple[State, str]] = {}
    # (what to order by, bound on what is left, ticket, commands so far, state): of equals the latest comes first.
    left = 0.0 if episode.won() else bound(root)
    frontier = [(left, left, 0, 0, root)]
    tickets = itertools.count(-1, -1)
    expanded = 0
    while frontier:
        _, left, _, steps, state = heapq.heappop(frontier)
        if left == 0:
            return Plan(_commands(reached_by, state), shortest=expanded <= budget)
        if steps > length[state]:
            continue
        expanded += 1
        if expanded == budget + 1:
            frontier = [(entry[1], *entry[1:]) for entry in frontier]
            heapq.heapify(frontier)
        episode.state = state
        for command, action in episode.actions().items():
            if not _matters(part, action):
                continue
            episode.state = state
            won = episode.step(command)[2]
            after = episode.state._replace(left=frozenset())  # changes only what `look` says
            if steps + 1 < length.get(after, math.inf):
                left = 0.0 if won else bound(after)
                if left < math.inf:
                    length[after], reached_by[after] = steps + 1, (state, command)
                    order = left if expanded > budget else steps + 1 + left
                    heapq.heappush(frontier, (order, left, next(tickets), steps + 1, after))
    return None


def _commands(reached_by: dict[State, tuple[State, str]], state: State) -> tuple[str, ...]:
    commands = []
    while state in reached_by:
        state, command = reached_by[state]
        commands.append(command)
    return tuple(reversed(commands))


def _matters(game: Game, action: Action) -> bool:
    """Whether a shortest plan may need a command.

    Looking and examining change nothing. A closed door only hinders. Without the `take` and `put` of what is neither
    wanted nor a knife to slice with, a plan still works (to move a lamp saves one `go to` at most, and costs two
    commands). Treating a thing otherwise than the goal says never helps, and may undo what it says.
    """
    goal = game.goal
    kind = game.things[action.thing].kind
    match action.verb:
        case "go" | "open" | "put":
            return True
        case "take":
            return kind == goal.kind or ("sliced" in goal.states and kind in _KNIVES)
        case "use":
            return kind == goal.lamp
        case "slice":
            return kind == goal.kind and "sliced" in goal.states
        case "clean" | "heat" | "cool":
            return kind == goal.kind and _RESULT[action.verb] in goal.states
    return False


def _cut_down(game: Game, state: State) -> tuple[Game, State]:
    """The part of a game that its plans need, with the state there.

    Names and rules stay, so that each plan of the part is one of the whole. Conversely, of things that stand together and
    are alike in all, a plan needs no more than the goal counts. And a place with nothing of interest in it is left out
    where a place kept has, for each receptacle there, one that serves in all its roles: a plan that uses that instead
    works too and is no longer. (Not so where a thing stands in two receptacles: a plan might want it in both.)
    """
    goal = game.goal
    kinds = {goal.kind, goal.lamp, *(_KNIVES if "sliced" in goal.states else ())}
    alike: Counter[tuple[Any, ...]] = Counter()
    number: dict[int, int] = {}
    in_two = False
    for t, thing in enumerate(game.things):
        if t == state.held or thing.kind in kinds:
            stands_in = tuple(r for r, contents in enumerate(state.contents) if t in contents)
            lies_at = frozenset(place for lying, place in state.lying if lying == t)
            states = tuple(t in getattr(state, name) for name in _THING_STATES)
            twin = (thing.kind, thing.abilities, t == state.held, stands_in, lies_at, states)
            alike[twin] += 1
            if alike[twin] <= goal.count:
                number[t] = len(number)
                in_two |= len(stands_in) + (t == state.held) > 1
    moved_kinds = {game.things[t].kind for t in number}

    def roles(r: int) -> set[str]:
        kind, openable = game.receptacles[r].kind, game.receptacles[r].openable
        found = {f"admits {moved}" for moved in moved_kinds if (kind, moved) in game.may_contain}
        found |= {verb for verb, (_, tools) in _TREATMENTS.items() if kind in tools and _RESULT[verb] in goal.states}
        return (
            found
            | ({"goal"} if kind == goal.receptacle_kind else set())
            | ({"open"} if not openable or r in state.opened else set())
        )

    at: dict[int, list[set[str]]] = {}
    for r, receptacle in enumerate(game.receptacles):
        at.setdefault(receptacle.place, []).append(roles(r))
    places = {game.receptacles[r].place for r, contents in enumerate(state.contents) if number.keys() & {*contents}}
    places |= {place for t, place in state.lying if t in number}
    if state.place is not None:
        places.add(state.place)
    for place in sorted(at, key=lambda place: -sum(map(len, at[place]))):
        if in_two or not any(all(any(one <= other for other in at[kept]) for one in at[place]) for kept in places):
            places.add(place)
    receptacles = [r for r, receptacle in enumerate(game.receptacles) if receptacle.place in places]
    part = game.model_copy(
        update={
            "receptacles": tuple(game.receptacles[r] for r in receptacles),
            # Only the state says where things are.
            "things": tuple(game.things[t].model_copy(update={"inside": (), "lying": ()}) for t in number),
            "start": None,
        }
    )
    return part, State(
        place=state.place,
        held=None if state.held is None else number[state.held],
        opened=frozenset(n for n, r in enumerate(receptacles) if r in state.opened),
        contents=tuple(tuple(number[t] for t in state.contents[r] if t in number) for r in receptacles),
        lying=frozenset((number[t], place) for t, place in state.lying if t in number),
        left=frozenset(),
        **{name: frozenset(number[t] for t in getattr(state, name) if t in number) for name in _THING_STATES},
    )


class _Bound:
    """No more than the commands that a state which has not won still needs; infinite only where it can't be won.

    For the last thing that is wanted this counts `take`, treatments and `put`, the way between agent, thing, tool and
    goal, doors, and laying down what is held instead. Of those before it, only what can't be shared with others.
    """

    def __init__(self, game: Game) -> None:
        self.game, self.goal = game, game.goal
        self.place = [receptacle.place for receptacle in game.receptacles]
        self.openable = frozenset(r for r, receptacle in enumerate(game.receptacles) if receptacle.openable)
        self.targets = [
            r for r, receptacle in enumerate(game.receptacles) if receptacle.kind == self.goal.receptacle_kind
        ]
        self.tools = {
            _RESULT[verb]: (ability, {receptacle.place for receptacle in game.receptacles if receptacle.kind in kinds})
            for verb, (ability, kinds) in _TREATMENTS.items()
        }

    def __call__(self, state: State) -> float:
        things, goal = self.game.things, self.goal
        standing = [(t, r) for r, contents in enumerate(state.contents) for t in contents]
        wanted: list[tuple[int, int | None]] = [(t, r) for t, r in standing if things[t].kind == goal.kind]
        if state.held is not None and things[state.held].kind == goal.kind:
            wanted.append((state.held, None))
        if goal.lamp is not None:
            lamps = [(self.place[r], t not in state.toggled) for t, r in standing if things[t].kind == goal.lamp]
            return min(
                (
                    cost + (place != at) + off
                    for cost, at in (self._fetch(state, r) for _, r in wanted)
                    for place, off in lamps
                ),
                default=math.inf,
            )
        return max(1, min((self._filling(state, wanted, target) for target in self.targets), default=math.inf))

    def _filling(self, state: State, wanted: list[tuple[int, int | None]], target: int) -> float:
        """To bring a target what it lacks."""
        count = self.goal.count
        if count == 1:
            return min((self._delivery(state, t, r, target) for t, r in wanted), default=math.inf)
        inside = state.contents[target]
        need = count - sum(self.game.things[t].kind == self.goal.kind for t in inside)
        outside = [(t, r) for t, r in wanted if t not in inside]
        if len(outside) < need:
            return math.inf
        if need <= 0:
            return 1
        last = min(self._delivery(state, t, r, target) for t, r in outside)
        if need == 1:
            return last
        each = sorted((1 if r is None else 2 + 2 * (self.place[r] != self.place[target])) for _, r in outside)
        return max(last, sum(each[:need]) - 1)

    def _fetch(self, state: State, source: int | None) -> tuple[float, int | None]:
        """To have in hand what stands in a receptacle (None: what is in hand), and where that is."""
        if source is None:
            return 0, state.place
        lay_down = state.held is not None and "sliced" not in self.goal.states
        return 1 + lay_down + self._shut(state, source) + (self.place[source] != state.place), self.place[source]

    def _shut(self, state: State, receptacle: int) -> bool:
        return receptacle in self.openable and receptacle not in state.opened

    def _delivery(self, state: State, thing: int, source: int | None, target: int) -> float:
        """To bring a thing to a target, treated as the goal says."""
        goal, end = self.goal, self.place[target]
        missing = [name for name in goal.states if thing not in getattr(state, name)]
        tools = [self.tools[name] for name in missing if name != "sliced"]
        if any(ability not in self.game.things[thing].abilities or not places for ability, places in tools):
            return math.inf
        there = thing in state.contents[target]
        if there and source == target and not tools:
            return len(missing)
        cost, at = self._fetch(state, source)
        cost += len(missing)
        if there and source != target:  # it stands in both: what is done to it in hand is done to it there
            return cost + max((min(at != p for p in places) for _, places in tools), default=0)
        if (goal.receptacle_kind, goal.kind) not in self.game.may_contain:
            return math.inf
        way = max((min((at != p) + (p != end) for p in places) for _, places in tools), default=at != end)
        return cost + way + (source != target and self._shut(state, target)) + 1
