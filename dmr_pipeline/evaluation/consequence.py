"""Consequences of the steps of many games, kept from one run to the next: what breaks off goes on, and more games can be added.

Of a policy that plays the games they are in no artifact: no stage reads them, and who asks for other games, policies or
precisions finds others. Of episodes that were recorded, `sensitivity_dataset` has them, for a router to learn from.
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
from dmr_pipeline.recipe.sensitivity import Consequences
from dmr_pipeline.rollout.choosing import seeded_generator
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.consequence import CONSEQUENCES, Origin, Player, Recorded, branched, consequences
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import load_router
from dmr_pipeline.router.policies import routing_policy

GAMES_AT_ONCE = 20
"""Played and kept together."""
PlayerName = Literal["low", "high", "mixed", "kl_router", "grpo_router"]
ROUTERS: Sequence[PlayerName] = ("kl_router", "grpo_router")
SWAPPED = pl.Schema({**CONSEQUENCES, "propensity": pl.Float64()})
"""`CONSEQUENCES` under one continuation, and the chance with which a step was drawn to be swapped, 1 where no actions differ."""
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

    @classmethod
    def of(cls, costs: Sequence[pl.DataFrame]) -> "Spent":
        return cls.model_validate(pl.concat(costs).sum().row(0, named=True))


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
        UserError: actions are drawn, so that no outcome is due to one step alone, or chosen among commands.
    """
    if recipe.agent.action == "score":
        raise UserError(
            f"{recipe.name}: agent.action is score, but steps are told apart by the actions that each precision writes; set it to"
            " generate"
        )
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

        def find(known: Known, some: Sequence[Task] = some) -> pl.DataFrame:
            return consequences(
                rollouts,
                some,
                players[behaviour],
                [players[name] for name in continuations],
                recipe.sensitivity.tokens,
                recipe.evaluation.seed,
                known,
                on_branches,
            )

        table, cost = _kept_or_found(kept, tasks, find)
        tables.append(table)
        costs.append(cost)
        on_games(len(some))
    return pl.concat(tables), Spent.of(costs)


def label_recorded(
    rollouts: Rollouts,
    section: Consequences,
    games: Sequence[Task],
    episodes: pl.DataFrame,
    steps: pl.DataFrame,
    rows: pl.DataFrame,
    folder: Path,
    on_games: Callable[[int], None] = lambda _: None,
) -> tuple[pl.DataFrame, Spent]:
    """Rows of `SWAPPED` for steps of episodes of these games that were recorded, and what they cost.

    Where the actions of a step differ at all, it is drawn with the chance `section.share` whether its precision is swapped; steps
    that are not drawn are left out.

    Args:
        episodes, steps: `rollout.tables`; those of other games are not looked at.
        rows: `labels.STEPS`, of these steps.
        folder: where they are kept, for these very arguments; it need not exist.
        on_games: called with the number of games that have just been labelled, or were before.
    """
    chances, route = swap_chances(rows, section), rollouts.route
    acted = steps.select("episode_id", "turn", acted="precision", probability=pl.lit(None, pl.Float64))
    drawn = rows.join(acted, on=["episode_id", "turn"], maintain_order="left", validate="m:1").join(
        chances, on=["episode_id", "turn"], maintain_order="left", validate="m:1"
    )
    # A continuation that draws does so by its task, alike in both branches.
    continuation = _unrouted(section.continuation, route, section.seed)
    kept, tables, costs = KeptTables(folder), [], []
    for first in range(0, len(games), GAMES_AT_ONCE):
        some = games[first : first + GAMES_AT_ONCE]
        by_task = {game.task_id: game for game in some}
        tasks: list[JsonValue] = [*by_task]
        played = steps.join(episodes.filter(pl.col("task_id").is_in(tasks)), on="episode_id", maintain_order="left")
        origins = {
            episode: Origin(by_task[task], actions, tuple(precisions))
            for episode, task, actions, precisions in played.group_by("episode_id", "task_id", maintain_order=True)
            .agg("action", "precision")
            .iter_rows()
        }
        theirs = drawn.filter(pl.col("episode_id").is_in([*origins]))

        def find(known: Known, theirs: pl.DataFrame = theirs, origins: dict[str, Origin] = origins) -> pl.DataFrame:
            table = branched(rollouts, theirs, origins, Recorded(route), [continuation], section.seed, known)
            return table.join(chances, on=["episode_id", "turn"], maintain_order="left", validate="m:1")

        table, cost = _kept_or_found(kept, tasks, find)
        tables.append(table.select(SWAPPED.names()))
        costs.append(cost)
        on_games(len(some))
    return pl.concat(tables), Spent.of(costs)


def swap_chances(rows: pl.DataFrame, section: Consequences) -> pl.DataFrame:
    """Steps that are looked at, and with what chance each was: `episode_id`, `turn`, `propensity`.

    Args:
        rows: `labels.STEPS`.
    """
    steps = rows.group_by("episode_id", "turn", maintain_order=True).agg(same=pl.col("greedy_agree").all())
    lots = [
        seeded_generator("swap", section.seed, episode, turn).random()
        for episode, turn in steps.select("episode_id", "turn").iter_rows()
    ]
    propensity = pl.when("same").then(1.0).otherwise(section.share)
    return (
        steps.with_columns(lot=pl.Series(lots, dtype=pl.Float64), propensity=propensity)
        .filter(pl.col("lot") < pl.col("propensity"))
        .select("episode_id", "turn", "propensity")
    )


def _kept_or_found(
    kept: KeptTables, tasks: list[JsonValue], find: Callable[[Known], pl.DataFrame]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The consequences in these games, and what they cost: one row, as `Spent`."""
    table, cost = kept.read(tasks=tasks), kept.read(tasks=tasks, what="spent")
    if table is None or cost is None or not table.schema.items() >= CONSEQUENCES.items():
        started, known = time.perf_counter(), Known()
        table = find(known)
        spent = (time.perf_counter() - started, known.asked, known.looked_up)
        cost = pl.DataFrame([spent], schema=["seconds", "actions", "looked_up"], orient="row")
        kept.write(table, tasks=tasks)
        kept.write(cost, tasks=tasks, what="spent")
    return table, cost


def _unrouted(name: Literal["low", "high", "mixed"], route: Sequence[str], seed: int) -> Player:
    if name == "mixed":
        return Player(name, RandomMixing(dict.fromkeys(route, 1 / len(route)), seed))
    return Player(name, SinglePrecision(route[-1] if name == "low" else route[0], route))


def _player(name: PlayerName, rollouts: Rollouts, recipe: Recipe, artifacts: dict[str, Path]) -> Player:
    route = rollouts.route
    if name == "kl_router" or name == "grpo_router":
        acting = rollouts.acting
        router = load_router(artifacts[name] / ROUTER_FOLDER, rollouts.device, acting.models[acting.cheapest])
        return Player(name, routing_policy(router, rollouts.rows), router.pass_bytes)
    return _unrouted(name, route, recipe.evaluation.seed)
