"""What an update of stage 2 learns from: groups of episodes of one game, whole ones or branches of one.

A group of whole episodes is GRPO's: the router samples each, and all decisions of an episode are credited with its reward minus
the group's mean. A group of branches gives credit where it belongs, and is ours: one episode is sampled, one of its decisions is
drawn, and from there every member goes on, the rungs dealt to them in turn. That decision alone is learned from, by all that
could have been chosen there. With R_i what member i earned, a_i the rung that it was dealt, p the router's chances at that
decision, q a rung's share of the members and V = sum_a p(a) mean(R_i: a_i = a), its advantage is

    T * p(a_i) / q(a_i) * (R_i - V)

whose mean over the group is 0 and whose gradient is that of the expected reward by this decision; T, the decisions of the sampled
episode, makes of the one that was drawn an estimate of their sum, which is what a whole episode gives.

A group whose rewards tie teaches nothing. `refills` plays other games in its place (DAPO's dynamic sampling, Yu et al., 2025).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dmr_pipeline.environments.base import Task
from dmr_pipeline.rollout.choosing import seeded_generator
from dmr_pipeline.rollout.trajectory import RolloutRequest, Step, Trajectory
from dmr_pipeline.router.calibration import chances
from dmr_pipeline.router.policies import Resumed

Play = Callable[[Sequence[RolloutRequest]], list[Trajectory]]
"""By the router as it samples in this update."""


@dataclass(frozen=True)
class Group:
    """What was played of one game."""

    episodes: Sequence[Trajectory]
    """Of its members."""
    rewards: Sequence[float]
    """Of these; of branches, the advantages."""
    tied: bool
    sampled: Sequence[Trajectory]
    """The episodes that are the router's own throughout."""
    turn: int | None = None
    """The decision that branches learn from; of whole episodes, all that the router was asked for."""

    @property
    def untrained(self) -> list[frozenset[int]]:
        """For each member the steps, from 0, from which nothing is learned."""
        return [
            frozenset(i for i, step in enumerate(episode.steps) if step.forced or self.turn not in (None, i))
            for episode in self.episodes
        ]


def play_groups(
    games: Sequence[Task],
    branched: Sequence[bool],
    size: int,
    route: Sequence[str],
    play: Play,
    earned: Callable[[Trajectory], float],
    seed: int,
) -> list[Group]:
    """A group of each game.

    Args:
        branched: for each game, whether its group is of branches.
        size: members of a group.
        route: the rungs, dearest first.
        earned: an episode's reward.
        seed: of the decisions that are drawn, together with the game.
    """
    kinds = list(zip(games, branched, strict=True))
    runs = [RolloutRequest(game, member) for game, one in kinds for member in range(1 if one else size)]
    played = iter(play(runs))
    sampled = [list(islice(played, 1 if one else size)) for one in branched]
    turns = [_drawn_turn(of_game[0], seed) if one else None for of_game, one in zip(sampled, branched, strict=True)]
    branches = [
        _branch(of_game[0], turn, member, route[member % len(route)])
        for of_game, turn in zip(sampled, turns, strict=True)
        if turn is not None
        for member in range(size)
    ]
    gone_on = iter(play(branches) if branches else [])
    groups = []
    for of_game, turn in zip(sampled, turns, strict=True):
        if turn is None:
            rewards = [earned(episode) for episode in of_game]
            # One episode alone: of a game that should have branched, but whose every step was forced.
            whole, earnings = (of_game, rewards) if len(of_game) == size else (of_game * size, [0.0] * size)
            groups.append(Group(whole, earnings, bool(np.ptp(earnings) == 0), of_game))
            continue
        members = list(islice(gone_on, size))
        rewards = [earned(episode) for episode in members]
        decisions = sum(not step.forced for step in of_game[0].steps)
        advantages = branch_advantages([episode.steps[turn] for episode in members], rewards, decisions, route)
        groups.append(Group(members, advantages, bool(np.ptp(rewards) == 0), of_game, turn))
    return groups


def refilled(
    groups: Sequence[Group], spare: Sequence[Task], again: Callable[[Sequence[Task], Sequence[bool]], list[Group]]
) -> list[Group]:
    """The groups, with those that tie replaced by such of other games as do not, as far as these reach.

    Args:
        spare: games that are not among the groups', in the order in which they are taken.
        again: plays groups of games, each of the kind that is told (as `branched`).
    """
    found, tied = list(groups), [i for i, group in enumerate(groups) if group.tied][: len(spare)]
    others = again(spare[: len(tied)], [groups[i].turn is not None for i in tied]) if tied else []
    for i, group in zip(tied, others, strict=True):
        if not group.tied:
            found[i] = group
    return found


def branch_advantages(
    steps: Sequence[Step], rewards: Sequence[float], decisions: int, route: Sequence[str]
) -> list[float]:
    """See the module.

    Args:
        steps: for each member the step at which it branched; every rung took one at least.
        rewards: for each member.
        decisions: T.
        route: the rungs, dearest first.
    """
    taken = [step.precision for step in steps]
    means = {rung: np.mean([r for r, a in zip(rewards, taken, strict=True) if a == rung]) for rung in route}
    likely = dict(zip(route, chances(np.array(steps[0].exceedance)), strict=True))
    value = sum(likely[rung] * means[rung] for rung in route)
    weights = [likely[rung] * len(taken) / taken.count(rung) for rung in taken]
    return [float(decisions * weight * (r - value)) for weight, r in zip(weights, rewards, strict=True)]


def _drawn_turn(episode: Trajectory, seed: int) -> int | None:
    """One of the steps at which the router was asked; None where there is none."""
    asked = [turn for turn, step in enumerate(episode.steps) if not step.forced]
    if not asked:
        return None
    return int(seeded_generator("grpo-branch", seed, episode.run.task.task_id).choice(asked))


def _branch(episode: Trajectory, turn: int, member: int, precision: str) -> RolloutRequest:
    taken = (*(step.precision for step in episode.steps[:turn]), precision)
    return Resumed(episode.run.task, member, taken=taken)
