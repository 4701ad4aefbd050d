"""New ALFWorld games by seed, in about the official proportions."""

import random
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
_LAMP_SURFACES = ("sidetable", "desk", "dresser", "shelf", "coffeetable", "diningtable")


def generate_game(seed: int, step_limit: int = 50) -> tuple[Game, int]:
    """The game of a seed, and how many candidates were rejected before it.

    A candidate is rejected where its task can't be set in the room drawn, or where the exploring expert does not win it
    within `step_limit` steps: the official games come with a solution too, which is what makes them games.
    """
    rng = random.Random(f"alfworld-game-{seed}")
    rejected = 0
    while True:
        game = _candidate(rng, seed)
        if game is not None and expert_wins(game, step_limit):
            return game, rejected
        rejected += 1


def expert_wins(game: Game, step_limit: int) -> bool:
    episode, expert = AlfWorldEpisode(game), ExploringExpert(game.instruction)
    expert.observe(None, episode.reset())
    for _ in range(step_limit):
        command = expert.act()
        observation, _, done = episode.step(command)
        if done:
            return True
        expert.observe(command, observation)
    return False


def _draw(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def _draw_count(rng: random.Random, histogram: Histogram) -> int:
    return rng.choices(list(histogram), weights=list(histogram.values()))[0]


def _candidate(rng: random.Random, seed: int) -> Game | None:
    table = household()
    task_type = _draw(rng, {task: sum(rooms.values()) for task, rooms in table.tasks.items()})
    targets = table.targets[task_type]
    room, kind, target, _ = rng.choices(targets, weights=[games for *_, games in targets])[0]
    state = _STATE.get(task_type)
    receptacles = _receptacles(rng, room)
    present = {receptacle.kind for receptacle in receptacles}
    looking = task_type == "look_at_obj_in_light"
    if (state and _NEEDS[state] not in present) or (not looking and target not in present):
        return None
    if looking and target != "desklamp":
        return None

    things: list[tuple[str, int]] = []

    def place(thing: str, banned: str | None = None) -> bool:
        weights = {k: n for k, n in table.stands_in[thing].items() if k in present and k != banned}
        if not weights:
            return False
        where = _draw(rng, weights)
        things.append((thing, rng.choice([i for i, r in enumerate(receptacles) if r.kind == where])))
        return True

    wanted = max(
        _draw_count(rng, table.things[room].get(kind, {1: 1.0})), 2 if task_type == "pick_two_obj_and_place" else 1
    )
    if not all(place(kind, banned=None if looking else target) for _ in range(wanted)):
        return None
    if looking:
        surfaces = [i for i, r in enumerate(receptacles) if r.kind in _LAMP_SURFACES]
        if not surfaces:
            return None
        things.append(("desklamp", rng.choice(surfaces)))
    for other, histogram in table.things[room].items():
        if other not in (kind, "desklamp"):
            for _ in range(_draw_count(rng, histogram)):
                place(other)
    named = _named([thing for thing, _ in things])
    placed = sorted(zip(named, things, strict=True), key=lambda pair: pair[0][0])
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
            "task_id": f"generated/{seed}",
            "task_type": task_type,
            "instruction": rng.choice(SENTENCES[task_type]).format(thing=kind, target=target),
            "receptacles": receptacles,
            "things": [
                Thing.model_validate(
                    {"name": name, "kind": thing, "inside": (where,), "abilities": table.abilities[thing]}
                )
                for (_, name), (thing, where) in placed
            ],
            "may_contain": {(k, t) for k in present for t in table.may_contain.get(k, ())},
            "goal": goal,
        }
    )


def _receptacles(rng: random.Random, room: str) -> list[Receptacle]:
    """The room's receptacles in listing order: kinds sorted, numbers from the highest down."""
    table = household()
    made: list[Receptacle] = []
    places = 0
    for kind, histogram in table.receptacles[room].items():
        count = _draw_count(rng, histogram)
        for number in range(count, 0, -1):
            shares = bool(made) and made[-1].kind == kind and rng.random() < table.shares_place.get(kind, 0.0)
            place = made[-1].place if shares else places
            places += not shares
            openable = rng.random() < table.openable.get(kind, 0.0)
            made.append(Receptacle(name=f"{kind} {number}", kind=kind, place=place, openable=openable))
    return made


def _named(kinds: list[str]) -> list[tuple[tuple[str, int], str]]:
    """For each thing its sort key in the engine's listing order, and its name."""
    total = {kind: kinds.count(kind) for kind in kinds}
    used = dict.fromkeys(total, 0)
    named = []
    for kind in kinds:
        used[kind] += 1
        named.append(((f"{kind}_", used[kind]), f"{kind} {total[kind] - used[kind] + 1}"))
    return named
