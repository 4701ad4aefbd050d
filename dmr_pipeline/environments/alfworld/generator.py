"""New ALFWorld games by seed, in about the official proportions."""

import random
from collections import Counter
from collections.abc import Mapping

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.game import Game, Goal, Receptacle, Thing
from dmr_pipeline.environments.alfworld.household import Histogram, household

SENTENCES = {
    "pick_and_place_simple": ("put a {thing} in {target}", "put some {thing} on {target}"),
    "look_at_obj_in_light": ("look at {thing} under the {target}", "examine the {thing} with the {target}"),
    "pick_clean_then_place_in_recep": ("put a clean {thing} in {target}", "clean some {thing} and put it in {target}"),
    "pick_heat_then_place_in_recep": ("put a hot {thing} in {target}", "heat some {thing} and put it in {target}"),
    "pick_cool_then_place_in_recep": ("put a cool {thing} in {target}", "cool some {thing} and put it in {target}"),
    "pick_two_obj_and_place": ("put two {thing} in {target}", "find two {thing} and put them in {target}"),
}
_STATE = {
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "hot",
    "pick_cool_then_place_in_recep": "cool",
}
_NEEDS = {"clean": "sinkbasin", "hot": "microwave", "cool": "fridge"}
_ROOMS_A_TASK = 200
"""Some official tasks suit few rooms, so another is drawn after that many: rare, or the proportions would shift."""


def generate_game(seed: int, step_limit: int = 50) -> tuple[Game, int]:
    """The game of a seed, and how many candidates were rejected before it.

    The task is drawn first, and rooms until one suits it. A room is rejected where the task can't be set in it, or where the
    exploring expert does not win within `step_limit` steps: the official games come with a solution too, which is what
    makes them games.
    """
    rng = random.Random(f"alfworld-game-{seed}")
    table = household()
    rejected = 0
    while True:
        task_type = _draw(rng, {task: sum(rooms.values()) for task, rooms in table.tasks.items()})
        targets = table.targets[task_type]
        room, kind, target, _ = rng.choices(targets, weights=[games for *_, games in targets])[0]
        for _ in range(_ROOMS_A_TASK):
            game = _candidate(rng, f"generated/{seed}", task_type, room, kind, target)
            if game is not None and expert_wins(game, step_limit):
                return game, rejected
            rejected += 1


def expert_wins(game: Game, step_limit: int) -> bool:
    return expert_steps(game, step_limit) is not None


def expert_steps(game: Game, step_limit: int) -> int | None:
    """Steps that the exploring expert takes to win; None where they are more than `step_limit`."""
    episode, expert = AlfWorldEpisode(game), ExploringExpert(game.instruction)
    expert.observe(None, episode.reset())
    for step in range(1, step_limit + 1):
        command = expert.act()
        observation, _, done = episode.step(command)
        if done:
            return step
        expert.observe(command, observation)
    return None


def _draw(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def _draw_count(rng: random.Random, histogram: Histogram) -> int:
    return rng.choices(list(histogram), weights=list(histogram.values()))[0]


def _candidate(rng: random.Random, task_id: str, task_type: str, room: str, kind: str, target: str) -> Game | None:
    """A room with the task in it; None where the room drawn has no place for it."""
    table = household()
    state = _STATE.get(task_type)
    receptacles = _receptacles(rng, room)
    present = {receptacle.kind for receptacle in receptacles}
    looking = task_type == "look_at_obj_in_light"
    if (state and _NEEDS[state] not in present) or (not looking and target not in present):
        return None
    numbers = {other: _draw_count(rng, histogram) for other, histogram in table.things[room].items() if other != kind}
    if looking:
        numbers[target] = max(1, numbers[target])
    numbers[kind] = _draw_count(rng, table.wanted[task_type])
    things: list[tuple[str, int]] = []
    for thing, number in numbers.items():
        where = None
        for _ in range(number):
            # What is wanted must not stand where it is to be brought.
            if where is None or rng.random() >= table.together.get(thing, 0.0):
                banned = target if thing == kind and not looking else None
                where = _standing_place(rng, table.stands_in[room].get(thing, {}), receptacles, banned)
            if where is not None:
                things.append((thing, where))
    placed = Counter(thing for thing, _ in things)
    if placed[kind] < min(numbers[kind], 2 if task_type == "pick_two_obj_and_place" else 1):
        return None
    if looking and not placed[target]:
        return None
    goal = (
        Goal(kind=kind, lamp=target)
        if looking
        else Goal(
            kind=kind,
            receptacle_kind=target,
            count=2 if task_type == "pick_two_obj_and_place" else 1,
            states=frozenset({state} if state else ()),
        )
    )
    return Game.model_validate(
        {
            "task_id": task_id,
            "task_type": task_type,
            "instruction": rng.choice(SENTENCES[task_type]).format(thing=kind, target=target),
            "receptacles": receptacles,
            "things": _named(things),
            "may_contain": {(k, t) for k in present for t in table.may_contain.get(k, ())},
            "goal": goal,
        }
    )


def _standing_place(
    rng: random.Random, stands_in: Mapping[str, int], receptacles: list[Receptacle], banned: str | None
) -> int | None:
    """Index of a receptacle of a kind where such a thing stands; None where the room has none."""
    present = {receptacle.kind for receptacle in receptacles} - {banned}
    weights = {kind: times for kind, times in stands_in.items() if kind in present}
    if not weights:
        return None
    kind = _draw(rng, weights)
    return rng.choice([i for i, receptacle in enumerate(receptacles) if receptacle.kind == kind])


def _receptacles(rng: random.Random, room: str) -> list[Receptacle]:
    """The room's receptacles in listing order: kinds sorted, numbers from the highest down."""
    table = household()
    made: list[Receptacle] = []
    places = 0
    for kind, histogram in table.receptacles[room].items():
        for number in range(_draw_count(rng, histogram), 0, -1):
            shared = table.shares_place.get(kind, {})
            other = _draw(rng, {**shared, "": 1 - sum(shared.values())})
            neighbours = [receptacle.place for receptacle in made if receptacle.kind == other]
            place = rng.choice(neighbours) if neighbours else places
            places += not neighbours
            openable = rng.random() < table.openable.get(kind, 0.0)
            made.append(Receptacle(name=f"{kind} {number}", kind=kind, place=place, openable=openable))
    return made


def _named(things: list[tuple[str, int]]) -> list[Thing]:
    """The (kind, receptacle) pairs as things in listing order: kinds sorted, numbers from the highest down."""
    left = Counter(kind for kind, _ in things)
    named = []
    for kind, where in sorted(things, key=lambda thing: thing[0]):
        abilities = household().abilities[kind]
        named.append(
            Thing.model_validate(
                {"name": f"{kind} {left[kind]}", "kind": kind, "inside": (where,), "abilities": abilities}
            )
        )
        left[kind] -= 1
    return named
