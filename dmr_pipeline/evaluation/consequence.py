"""Consequences of the steps of many games, kept from one run to the next: what breaks off goes on, and more games can be added.

They are in no artifact: no stage reads them, and who asks for other games, policies or precisions finds others.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import JsonValue

from dmr_pipeline.environments.base import Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.play import acting_facts, content
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.engine import SinglePrecision
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.consequence import CONSEQUENCES, Player, consequences
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import load_router
from dmr_pipeline.router.policies import routing_policy

GAMES_AT_ONCE = 20
"""Played and kept together."""
PlayerName = Literal["low", "high", "mixed", "kl_router", "grpo_router"]
ROUTERS: Sequence[PlayerName] = ("kl_router", "grpo_router")
_VERSION = 1
"""Of what is kept: to be raised where the code finds other consequences."""


class Spent(FrozenModel):
    """What it took to find the consequences, in all runs together."""

    seconds: float
    """By the clock."""
    actions: int
    """That were wanted."""
    looked_up: int
    """Those of them that were known."""


def label_games(
    rollouts: Rollouts,
    recipe: Recipe,
    games: Sequence[Task],
    behaviour: PlayerName,
    continuations: Sequence[PlayerName],
    artifacts: dict[str, Path],
    folder: Path,
    on_games: Callable[[int], None] = lambda _: None,
    on_branches: Callable[[int], None] = lambda _: None,
) -> tuple[pl.DataFrame, Spent]:
    """Rows of `CONSEQUENCES` for every step of a policy's episodes of these games, and what they cost.

    Args:
        artifacts: stage -> folder, verified: `benchmark_tasks`, `quantized_checkpoints` and those of the routers that play.
        folder: where they are kept; it need not exist.
        on_games: called with the number of games that have just been labelled, or were before.
        on_branches: called with the number of branches that have just ended.

    Raises:
        UserError: actions are drawn, so that no outcome is due to one step alone.
    """
    if recipe.agent.temperature > 0:
        raise UserError(
            f"{recipe.name}: agent.temperature is {recipe.agent.temperature}, but consequences are those of greedy acting;"
            " set it to 0"
        )
    names = list(dict.fromkeys([behaviour, *continuations]))
    players = {name: _player(name, rollouts, recipe, artifacts) for name in names}
    checkpoints = artifacts["quantized_checkpoints"]
    facts: dict[str, JsonValue] = {
        "version": _VERSION,
        "games": content(artifacts["benchmark_tasks"]),
        "counted": recipe.sensitivity.tokens,
        "behaviour": behaviour,
        "continuations": list(continuations),
        "routers": {name: content(artifacts[name], f"{ROUTER_FOLDER}/") for name in names if name in ROUTERS},
        **acting_facts(checkpoints, recipe, rollouts.route),
    }
    kept, tables, costs = KeptTables(folder, facts), [], []
    for first in range(0, len(games), GAMES_AT_ONCE):
        some = games[first : first + GAMES_AT_ONCE]
        tasks: list[JsonValue] = [game.task_id for game in some]
        table, cost = kept.read(tasks=tasks), kept.read(tasks=tasks, what="spent")
        if table is None or cost is None or table.schema != CONSEQUENCES:
            started, known = time.perf_counter(), Known()
            table = consequences(
                rollouts,
                some,
                players[behaviour],
                [players[name] for name in continuations],
                recipe.sensitivity.tokens,
                recipe.evaluation.seed,
                known,
                on_branches,
            )
            spent = (time.perf_counter() - started, known.asked, known.looked_up)
            cost = pl.DataFrame([spent], schema=["seconds", "actions", "looked_up"], orient="row")
            kept.write(table, tasks=tasks)
            kept.write(cost, tasks=tasks, what="spent")
        tables.append(table)
        costs.append(cost)
        on_games(len(some))
    return pl.concat(tables), Spent.model_validate(pl.concat(costs).sum().row(0, named=True))


def _player(name: PlayerName, rollouts: Rollouts, recipe: Recipe, artifacts: dict[str, Path]) -> Player:
    route = rollouts.route
    if name in ROUTERS:
        acting = rollouts.acting
        router = load_router(artifacts[name] / ROUTER_FOLDER, rollouts.device, acting.models[acting.cheapest])
        return Player(name, routing_policy(router, rollouts.rows), router.pass_bytes)
    if name == "mixed":
        return Player(name, RandomMixing(dict.fromkeys(route, 1 / len(route)), recipe.evaluation.seed))
    return Player(name, SinglePrecision(route[-1] if name == "low" else route[0], route))
