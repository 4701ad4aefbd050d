"""Plans against plain breadth-first search in the engine, the exploring expert and the official walkthroughs."""

import math
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode, State
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.game import Game, Goal, Receptacle, Thing
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.official.reading import read_game
from dmr_pipeline.environments.alfworld.official.verify import read_walkthrough
from dmr_pipeline.environments.alfworld.planner import Plan, shortest_plan
from tests.helpers import needs

_STATES = 6_000
"""Above this a tiny game is not tiny enough to be searched through."""


def wins_in(game: Game, state: State | None, plan: Plan) -> bool:
    """Whether a plan wins with its last command and no earlier."""
    episode = AlfWorldEpisode(game)
    episode.state = episode.state if state is None else state
    won = [episode.won()]
    for command in plan.commands:
        assert command in episode.actions(), command
        won.append(episode.step(command)[2])
    return won == [False] * len(plan.commands) + [True]


def distance(game: Game, state: State) -> float | None:
    """Commands to the nearest winning state, by breadth-first search; infinite if there is none, None if it is far."""
    episode = AlfWorldEpisode(game)
    episode.state = state
    if episode.won():
        return 0
    level, seen, steps = [state], {state}, 0
    while level:
        following = []
        steps += 1
        for before in level:
            episode.state = before
            for command in episode.admissible_commands():
                if command.split()[0] in ("look", "inventory", "examine"):
                    continue
                episode.state = before
                if episode.step(command)[2]:
                    return steps
                after = episode.state._replace(left=frozenset())
                if after not in seen:
                    seen.add(after)
                    following.append(after)
        if len(seen) > _STATES:
            return None
        level = following
    return math.inf


def tiny_game(rng: random.Random) -> Game:
    """Anything of what official games have, in a few receptacles."""
    task = rng.choice(["simple", "lamp", "clean", "hot", "cool", "two", "odd"])
    tool = {"clean": "sinkbasin", "hot": "microwave", "cool": "fridge"}.get(task, "fridge")
    kinds = ["desk", tool, *(rng.choice(["desk", "drawer", tool, "microwave"]) for _ in range(rng.randint(1, 3)))]
    receptacles = tuple(
        Receptacle(name=f"{kind} {n}", kind=kind, place=rng.randrange(len(kinds)), openable=rng.random() < 0.4)
        for n, kind in enumerate(kinds)
    )
    things = []
    for n in range(rng.randint(2, 4)):
        kind = "apple" if n < 1 + (task == "two") else rng.choice(["apple", "apple", "lamp", "knife"])
        if task == "odd" and n == 1:
            kind = "knife"
        abilities = {"pickupable"}
        if kind == "apple":
            abilities |= {ability for ability in ("cleanable", "heatable", "coolable") if rng.random() < 0.7}
        if kind == "lamp" or rng.random() < 0.05:
            abilities = {"toggleable"} if rng.random() < 0.7 else {"toggleable", "pickupable"}
        if task == "odd" and kind == "apple":
            abilities |= {"sliceable"}
        inside = tuple(sorted(rng.sample(range(len(kinds)), 1 if rng.random() < 0.8 else 2)))
        things.append(
            Thing(
                name=f"{kind} {n}",
                kind=kind,
                inside=inside,
                abilities=frozenset(abilities),
                lying=(rng.choice(receptacles).place,) if rng.random() < 0.1 else None,
                starts_cool=rng.random() < 0.1,
            )
        )
    if task == "odd":  # goals that the model allows but no official game has
        states = frozenset(rng.choice([["sliced"], ["sliced", "cool"], ["cool"]]))
        count = rng.randint(1, 2) if states == {"sliced"} else 1
        goal = Goal(kind="apple", receptacle_kind="desk", count=count, states=states)
    elif task == "lamp":
        goal = Goal(kind=rng.choice(["apple", "apple", "apple", "lamp"]), lamp="lamp")
    else:
        states = frozenset({task} & {"clean", "hot", "cool"})
        goal = Goal(kind="apple", receptacle_kind="desk", count=1 + (task == "two"), states=states)
    pairs = {(r, t) for r in set(kinds) for t in ("apple", "lamp", "knife") if rng.random() < 0.9}
    return Game(
        task_id="tiny",
        task_type="pick_and_place_simple",
        instruction="",
        receptacles=receptacles,
        things=tuple(things),
        may_contain=frozenset(pairs),
        goal=goal,
        put_wording=rng.choice(["move", "put"]),
        start=rng.choice([None, receptacles[0].place]),
        help=None,
    )


def wander(game: Game, rng: random.Random, steps: int) -> State:
    """A state that random commands lead to, treatments and the like more often than goings."""
    episode = AlfWorldEpisode(game)
    for _ in range(steps):
        commands = episode.admissible_commands()
        verb = rng.choice(sorted({command.split()[0] for command in commands}))
        episode.step(rng.choice([command for command in commands if command.split()[0] == verb]))
    return episode.state


@given(st.integers(0, 10**9), st.integers(0, 14))
@settings(max_examples=120, deadline=None)
def test_no_shorter_way_exists(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    game = tiny_game(rng)
    state = wander(game, rng, steps)
    plan, nearest = shortest_plan(game, state), distance(game, state)
    if nearest == math.inf:
        assert plan is None
    elif nearest is not None:
        assert plan is not None
        assert plan.shortest
        assert len(plan.commands) == nearest
        assert wins_in(game, state, plan)


def test_the_tiny_games_are_of_all_sorts() -> None:
    games = [tiny_game(random.Random(seed)) for seed in range(200)]
    assert {state for game in games for state in game.goal.states} == {"clean", "hot", "cool", "sliced"}
    assert {game.goal.count for game in games} == {1, 2}
    assert {game.put_wording for game in games} == {"move", "put"}
    assert any(game.goal.lamp for game in games)
    assert any(len(thing.inside) > 1 for game in games for thing in game.things)
    lengths = Counter(-1 if plan is None else len(plan.commands) for plan in map(shortest_plan, games))
    assert max(lengths) >= 8
    assert 0 < lengths[-1] < 80, "too many of them can't be won"


@given(st.integers(0, 10**6), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_never_longer_than_exploring(seed: int, steps: int) -> None:
    game, _ = generate_game(seed)
    plan = shortest_plan(game)
    assert plan is not None
    assert wins_in(game, None, plan)
    assert plan.shortest
    episode, expert, explored = AlfWorldEpisode(game), ExploringExpert(game.instruction), 0
    observation, command = episode.reset(), None
    while not episode.won():
        expert.observe(command, observation)
        command = expert.act()
        observation, _, _ = episode.step(command)
        explored += 1
    assert len(plan.commands) <= explored
    state = wander(game, random.Random(seed), steps)
    from_there = shortest_plan(game, state)
    if from_there is not None:
        assert wins_in(game, state, from_there)


def test_each_step_of_a_plan_brings_the_goal_one_nearer() -> None:
    game, _ = generate_game(3)
    plan = shortest_plan(game)
    assert plan is not None
    episode = AlfWorldEpisode(game)
    for taken, command in enumerate(plan.commands, 1):
        episode.step(command)
        rest = shortest_plan(game, episode.state)
        assert rest is not None
        assert len(rest.commands) == len(plan.commands) - taken


def test_without_a_budget_a_plan_wins_but_proves_nothing() -> None:
    for seed in range(60):
        game, _ = generate_game(seed)
        greedy, best = shortest_plan(game, budget=0), shortest_plan(game)
        assert greedy is not None
        assert best is not None
        assert not greedy.shortest
        assert wins_in(game, None, greedy)
        assert len(best.commands) <= len(greedy.commands) <= 2 * len(best.commands)


def test_no_plan_where_what_is_held_fits_nowhere() -> None:
    game, _ = generate_game(3)
    held = next(t for t, thing in enumerate(game.things) if thing.kind != game.goal.kind)
    pairs = frozenset((r, t) for r, t in game.may_contain if t != game.things[held].kind)
    game = game.model_copy(update={"may_contain": pairs})
    assert shortest_plan(game) is not None
    assert shortest_plan(game, AlfWorldEpisode(game).state._replace(held=held)) is None


@needs.official_games
def test_plans_for_official_games_are_no_longer_than_their_walkthroughs() -> None:
    proven = 0
    for path in needs.OFFICIAL_GAMES:
        game = read_game(path)
        plan = shortest_plan(game)
        assert plan is not None
        assert wins_in(game, None, plan)
        assert len(plan.commands) <= len(read_walkthrough(path))
        proven += plan.shortest
    assert proven >= 0.99 * len(needs.OFFICIAL_GAMES)
