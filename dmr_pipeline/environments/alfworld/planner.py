"""Shortest plans for ALFWorld games by one who knows the whole game.

The search runs in the engine itself, on a copy of the game that is cut down to what can matter.
"""

import heapq
import itertools
import math
from collections import Counter
from typing import NamedTuple

from dmr_pipeline.environments.alfworld.engine import KNIVES, TREATMENTS, Action, AlfWorldEpisode, State, start_state
from dmr_pipeline.environments.alfworld.game import Game

_RESULT = {"clean": "clean", "heat": "hot", "cool": "cool", "slice": "sliced"}
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
    if action.verb in ("go", "open", "put"):
        return True
    if action.verb in ("look", "inventory", "help", "examine", "close"):
        return False
    kind = game.things[action.thing].kind
    if action.verb == "take":
        return kind == goal.kind or ("sliced" in goal.states and kind in KNIVES)
    if action.verb == "use":
        return kind == goal.lamp
    return kind == goal.kind and _RESULT[action.verb] in goal.states


def _cut_down(game: Game, state: State) -> tuple[Game, State]:
    """The part of a game that a shortest plan needs, with the state there.

    Names and rules stay, so that each plan of the part is one of the whole. Conversely, a place where nothing of interest
    lies is left out only where a kept place has, for each receptacle there, one that serves in all its roles: a plan that
    uses that instead works too and is no longer. (Not so where a thing stands in two receptacles, or in one while it is
    held: a plan might want it in both.)
    """
    goal = game.goal
    kinds = {goal.kind, goal.lamp, *(KNIVES if "sliced" in goal.states else ())}
    things = [t for t, thing in enumerate(game.things) if t == state.held or thing.kind in kinds]
    number = {t: n for n, t in enumerate(things)}
    spots = Counter(t for contents in (*state.contents, (state.held,)) for t in contents if t in number)
    movable = {game.things[t].kind for t in things}

    def roles(r: int) -> set[str]:
        kind, openable = game.receptacles[r].kind, game.receptacles[r].openable
        found = {f"admits {moved}" for moved in movable if (kind, moved) in game.may_contain}
        found |= {verb for verb, (_, tools) in TREATMENTS.items() if kind in tools and _RESULT[verb] in goal.states}
        found |= {"goal"} if kind == goal.receptacle_kind else set()
        return found if openable and r not in state.opened else found | {"open"}

    at: dict[int | None, list[set[str]]] = {}
    places = {state.place, *(place for t, place in state.lying if t in number)}
    for r, receptacle in enumerate(game.receptacles):
        at.setdefault(receptacle.place, []).append(roles(r))
        if number.keys() & {*state.contents[r]}:
            places.add(receptacle.place)
    everywhere = max(spots.values(), default=0) > 1
    for place in sorted(at, key=lambda place: -sum(map(len, at[place]))):
        served = (all(any(one <= other for other in at.get(kept, ())) for one in at[place]) for kept in places)
        if everywhere or not any(served):
            places.add(place)
    receptacles = [r for r, receptacle in enumerate(game.receptacles) if receptacle.place in places]
    changes = {
        "receptacles": tuple(game.receptacles[r] for r in receptacles),
        # Only the state says where things are.
        "things": tuple(game.things[t].model_copy(update={"inside": (), "lying": ()}) for t in things),
        "start": None,
    }
    return game.model_copy(update=changes), State(
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
    goal, doors, and laying down what is held instead. For those before it, only what they can't share.
    """

    def __init__(self, game: Game) -> None:
        self.game, self.goal = game, game.goal
        self.place = [receptacle.place for receptacle in game.receptacles]
        self.targets = [r for r, one in enumerate(game.receptacles) if one.kind == self.goal.receptacle_kind]
        self.tools = {
            _RESULT[verb]: (ability, {one.place for one in game.receptacles if one.kind in kinds})
            for verb, (ability, kinds) in TREATMENTS.items()
        }

    def __call__(self, state: State) -> float:
        kind, lamp = self.goal.kind, self.goal.lamp
        things: list[tuple[int, int | None]] = [(t, r) for r, contents in enumerate(state.contents) for t in contents]
        if state.held is not None:
            things.append((state.held, None))
        wanted = [(t, r) for t, r in things if self.game.things[t].kind == kind]
        if lamp is None:
            bounds = [self._filling(state, wanted, target) for target in self.targets]
        else:
            fetched = [self._fetch(state, r) for _, r in wanted]
            bounds = [
                cost + (r is not None and self.place[r] != at) + (t not in state.toggled)
                for t, r in things
                if self.game.things[t].kind == lamp
                for cost, at in fetched
            ]
        return max(1, min(bounds, default=math.inf))

    def _filling(self, state: State, wanted: list[tuple[int, int | None]], target: int) -> float:
        """To bring a target what it lacks."""
        goal = self.goal
        inside = state.contents[target] if goal.count > 1 else ()
        need = goal.count - sum(self.game.things[t].kind == goal.kind for t in inside)
        if need <= 0:
            return 0
        outside = [(t, r) for t, r in wanted if t not in inside]
        if len(outside) < need:
            return math.inf
        last = min(self._delivery(state, t, r, target) for t, r in outside)
        if need == 1:
            return last
        each = sorted(1 if r is None else 2 + 2 * (self.place[r] != self.place[target]) for _, r in outside)
        return max(last, sum(each[:need]) - 1)  # the agent may stand where the first is

    def _fetch(self, state: State, source: int | None) -> tuple[int, int | None]:
        """To have in hand what stands in a receptacle (None: what is in hand), and where the agent is then."""
        if source is None:
            return 0, state.place
        at = self.place[source]
        return 1 + (state.held is not None) + self._shut(state, source) + (at != state.place), at

    def _shut(self, state: State, receptacle: int) -> bool:
        return self.game.receptacles[receptacle].openable and receptacle not in state.opened

    def _delivery(self, state: State, thing: int, source: int | None, target: int) -> float:
        """To bring a thing to a target, treated as the goal says (of several things, only one need be)."""
        goal, end = self.goal, self.place[target]
        missing = [name for name in goal.states if thing not in getattr(state, name)] if goal.count == 1 else []
        tools = [self.tools[name] for name in missing if name != "sliced"]
        if any(ability not in self.game.things[thing].abilities for ability, _ in tools):
            return math.inf
        if source == target and not tools:
            return len(missing)
        cost, at = self._fetch(state, source)
        if thing in state.contents[target] and source != target:  # it stands in both
            detours = [min((at != p for p in places), default=math.inf) for _, places in tools]
            return cost + len(missing) + max(detours, default=0)
        if (self.game.receptacles[target].kind, goal.kind) not in self.game.may_contain:
            return math.inf
        ways = [min(((at != p) + (p != end) for p in places), default=math.inf) for _, places in tools]
        put = 1 + (source != target and self._shut(state, target))
        return cost + len(missing) + max(ways, default=at != end) + put
