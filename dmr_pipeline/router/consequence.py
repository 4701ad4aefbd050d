"""Labels of steps by consequence: what becomes of an episode where one step of it is taken at another precision.

Where the greedy actions of a cheaper routed rung and of the dearest differ, two branches leave the played episode: in one the
dearest takes the step, in the other the cheaper one (here, of the two, high and low). Both go on under the same stated
continuation. The step is *needed* where high wins and low loses, *harmful* where low wins and high loses, else *neutral*. Where
the actions are the same nothing follows from who takes the step: with one cache each that is exact for continuations that
do not look at who has acted, and else our simplification.

A branch is played from its episode's start, by the decisions of the policy that played the episode, or as they were recorded. Up
to the branch all actions are looked up (rollout/known.py), so that it costs commands to the environment and no forward passes of
the agent (of a recorded episode, from its second branch on); and the environment, the transcript, each cache and what each policy
remembers are by then what they were, whatever they are made of.
Greedy acting alone has consequences in this sense: with drawn actions an outcome is a draw too.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import polars as pl

from dmr_pipeline.environments.base import Task
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import PolicyRuns, Rollouts
from dmr_pipeline.rollout.policy import Decision, DecisionContext, RoutingPolicy, certain
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.labels import measure

log = logging.getLogger(__name__)

OUTCOMES = pl.Schema(
    {
        f"{side}_{name}": kind
        for side in ("high", "low")
        for name, kind in (
            ("success", pl.Boolean()),
            ("steps", pl.Int64()),
            ("tokens", pl.Int64()),
            ("cost", pl.Float64()),
        )
    }
)
CONSEQUENCES = pl.Schema(
    {
        "episode_id": pl.String(),
        "task_id": pl.String(),
        "task_type": pl.String(),
        "policy": pl.String(),
        "success": pl.Boolean(),
        "turn": pl.Int64(),
        "acted": pl.String(),
        "probability": pl.Float64(),
        "precision": pl.String(),
        "kl_high_low": pl.Float64(),
        "kl_low_high": pl.Float64(),
        "js": pl.Float64(),
        "greedy_agree": pl.Boolean(),
        "entropy_low": pl.Float64(),
        "margin_low": pl.Float64(),
        "continuation": pl.String(),
        **OUTCOMES,
        "label": pl.String(),
    }
)
"""One row a step of a played episode, cheaper routed rung (`precision`) and continuation. `policy` and `success` are the played
episode's, `acted` the rung that took the step there, `probability` the router's for the dearest (null where none played);
divergences as in `labels.STEPS`. `high_*` and `low_*` are what became of the branches from this step on, it included: success,
steps, tokens read and cost (in the ladder's unit); null where the actions are the same, and so nothing was played."""


@dataclass(frozen=True)
class Player:
    """A policy that plays episodes, or goes on with them."""

    name: str
    policy: RoutingPolicy
    router: PassBytes | None = None
    """What a pass of its router reads, where it has one."""


@dataclass(frozen=True)
class Branch(RolloutRequest):
    """An episode that leaves a played one."""

    turn: int = 0
    """From 0: the step at which it does."""
    precision: str = ""
    """That takes this step."""
    acted: tuple[str, ...] = ()
    """The precisions that took the played episode's steps."""


class Branching:
    """Plays `Branch`es: up to the branch `behaviour` decides, its step is taken by the precision that it says, then
    `continuation` decides.

    The continuation is told of all steps. It may be the behaviour itself.
    """

    def __init__(self, behaviour: RoutingPolicy, continuation: RoutingPolicy) -> None:
        self._behaviour, self._continuation = behaviour, continuation
        self._policies = [behaviour] if continuation is behaviour else [behaviour, continuation]
        self._branches: dict[int, Branch] = {}
        self._turns: dict[int, int] = {}

    def begin(self, slot: int, run: RolloutRequest) -> None:
        assert isinstance(run, Branch)
        self._branches[slot], self._turns[slot] = run, 0
        for policy in self._policies:
            policy.begin(slot, run)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        decisions: dict[int, Decision] = {}
        for policy in self._policies:
            mine = [i for i, slot in enumerate(slots) if self._decider(slot) is policy]
            if mine:
                answers = policy.decide([slots[i] for i in mine], [segments[i] for i in mine], peek)
                decisions |= zip(mine, answers, strict=True)
        for i, slot in enumerate(slots):
            branch = self._branches[slot]
            if self._turns[slot] == branch.turn:
                decisions[i] = replace(decisions[i], precision=branch.precision, drafter=None)
        return [decisions[i] for i in range(len(slots))]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self._turns[slot] += 1
        for policy in self._policies:
            policy.acted(slot, segment, precision, action)

    def _decider(self, slot: int) -> RoutingPolicy:
        return self._continuation if self._turns[slot] > self._branches[slot].turn else self._behaviour


class Recorded:
    """Decides as it was decided in the played episode, up to the branch."""

    def __init__(self, route: Sequence[str]) -> None:
        self.route = tuple(route)
        self._left: dict[int, list[str]] = {}

    def begin(self, slot: int, run: RolloutRequest) -> None:
        assert isinstance(run, Branch)
        self._left[slot] = list(reversed(run.acted))

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        return [Decision(self._left[slot][-1], certain(self._left[slot][-1], self.route)) for slot in slots]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        if self._left[slot]:
            self._left[slot].pop()


class Origin(NamedTuple):
    """A played episode, which branches leave."""

    task: Task
    actions: Sequence[list[int]]
    """Token ids, of each step."""
    acted: tuple[str, ...]
    """Precision, of each step."""


def consequences(
    rollouts: Rollouts,
    games: Sequence[Task],
    behaviour: Player,
    continuations: Sequence[Player],
    counted: Literal["action", "command"],
    seed: int,
    known: Known,
    on_progress: Callable[[int], None] = lambda _: None,
) -> pl.DataFrame:
    """Let a policy play the games, once each, and label every step that it takes.

    Args:
        rollouts: with greedy actions.
        counted: as in `labels.measure`: over what divergences are summed, and which tokens make two actions differ.
        seed: of the policies' episodes.
        known: what may be looked up, by and by what is found.
        on_progress: called with the number of branches that have just ended.

    Returns:
        Rows of `CONSEQUENCES`.
    """
    played = rollouts.play([RolloutRequest(game) for game in games], behaviour.policy, seed, known=known)
    episodes, steps = to_frames(played, behaviour.name)
    level = pl.col("exceedance").list.first() if behaviour.router is not None else pl.lit(None)
    acted = steps.select("episode_id", "turn", acted="precision", probability=level.cast(pl.Float64))
    rows = measure(rollouts, episodes, steps, counted).steps.join(
        acted, on=["episode_id", "turn"], maintain_order="left", validate="m:1"
    )
    origins = {
        episode: Origin(its.run.task, [s.action for s in its.steps], tuple(s.precision for s in its.steps))
        for episode, its in zip(episodes["episode_id"], played, strict=True)
    }
    return branched(rollouts, rows, origins, behaviour.policy, continuations, seed, known, on_progress)


def branched(
    rollouts: Rollouts,
    rows: pl.DataFrame,
    origins: Mapping[str, Origin],
    behaviour: RoutingPolicy,
    continuations: Sequence[Player],
    seed: int,
    known: Known,
    on_progress: Callable[[int], None] = lambda _: None,
) -> pl.DataFrame:
    """Both branches wherever the actions differ.

    Args:
        rows: a row a step and cheaper routed rung: the columns of `CONSEQUENCES` up to `margin_low`.
        origins: by `episode_id`.
        behaviour: decides as it was decided in these episodes.
        seed, known, on_progress: as of `consequences`.

    Returns:
        Rows of `CONSEQUENCES`, without those whose branches did not follow their episode.
    """
    apart = list(rows.filter(~pl.col("greedy_agree")).select("episode_id", "turn", "precision").iter_rows())
    runs = [
        Branch(origins[episode].task, turn=turn, precision=rung, acted=origins[episode].acted)
        for episode, turn, low in apart
        for rung in (rollouts.route[0], low)
    ]
    tables: dict[str, pl.DataFrame] = {}

    def on_played(index: int, branches: list[Trajectory], _: Timings) -> None:
        name, router = continuations[index].name, continuations[index].router
        outcomes = []
        for (episode, turn, low), high_branch, low_branch in zip(apart, branches[::2], branches[1::2], strict=True):
            if _left(origins[episode], high_branch, turn) and _left(origins[episode], low_branch, turn):
                outcome = (*_rest(rollouts, high_branch, turn, router), *_rest(rollouts, low_branch, turn, router))
                outcomes.append((episode, turn, low, *outcome))
        if len(outcomes) < len(apart):
            log.warning(
                "%d of %d pairs of branches, on under %s, did not follow their episode up to the step (rounding): left out",
                len(apart) - len(outcomes),
                len(apart),
                name,
            )
        key = {column: CONSEQUENCES[column] for column in ("episode_id", "turn", "precision")}
        table = pl.DataFrame(outcomes, schema=key | dict(OUTCOMES), orient="row")
        labelled = rows.join(table, on=list(key), how="left", maintain_order="left", validate="1:1")
        compared = labelled.filter(pl.col("greedy_agree") | pl.col("high_success").is_not_null())
        tables[name] = compared.with_columns(continuation=pl.lit(name), label=label_of()).select(CONSEQUENCES.names())

    plays = [PolicyRuns(Branching(behaviour, continuation.policy), runs, on_progress) for continuation in continuations]
    rollouts.play_each(plays, seed, on_played, known)
    return pl.concat([tables[continuation.name] for continuation in continuations])


def label_of() -> pl.Expr:
    """Of a row, by the outcomes of its branches; `neutral` where there are none."""
    high, low = pl.col("high_success"), pl.col("low_success")
    return (
        pl.when(high & ~low)
        .then(pl.lit("needed"))
        .when(low & ~high)
        .then(pl.lit("harmful"))
        .otherwise(pl.lit("neutral"))
    )


def _left(origin: Origin, branch: Trajectory, turn: int) -> bool:
    """Whether the branch is the played episode up to this step, which it takes itself."""
    before = list(origin.actions[:turn])
    return len(branch.steps) > turn and [step.action for step in branch.steps[:turn]] == before


def _rest(rollouts: Rollouts, branch: Trajectory, turn: int, router: PassBytes | None) -> tuple[bool, int, int, float]:
    """`OUTCOMES` of a branch from this step on."""
    rest = replace(branch, steps=branch.steps[turn:])
    return rest.success, len(rest.steps), rest.tokens_read, rollouts.cost(rest, router).total
