"""Stage 2 of the router: GRPO (Shao et al., 2024) on success and cost.

A group is several episodes of one game by the router that samples; each is credited with its reward minus the group's mean
(router/grpo_groups.py). The paper's reward is success - lambda * cost; the default, success * (1 - lambda * cost), is ours: cheap
failure must not pay. With a budget, lambda is its Lagrange multiplier, found by dual ascent: after each update it rises by what
was spent above the budget, and those weights are best that win the most within it. Ours as well: start from the stage-1 router,
shifted to a ratio at which groups do not tie; train all its weights; keep those that are best on validation games, acting at
a threshold of 0.5; then calibrate the threshold to a ratio, if the recipe names one. A router whose decisions have all become
certain learns nothing more, and its training ends. A training resumes after a kill with the same result.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.progress import TextColumn, TimeElapsedColumn
from scipy.optimize import brentq
from scipy.special import xlogy
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from dmr_pipeline.artifacts.manifest import hash_files
from dmr_pipeline.artifacts.resume import discard, load_state, save_state
from dmr_pipeline.environments.base import Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.progress import Bars, training_bars
from dmr_pipeline.recipe.grpo_router import GrpoBudget, GrpoRouter
from dmr_pipeline.rollout.choosing import seeded_generator
from dmr_pipeline.rollout.cost import reward
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.baselines import RandomMixing, two_way_shares
from dmr_pipeline.router.calibration import by_rung, chances, rest_of, shares
from dmr_pipeline.router.grpo_groups import Group, play_groups, refilled
from dmr_pipeline.router.grpo_trainer import Rollout, RoutingTrainer
from dmr_pipeline.router.model import Router, RouterSettings, routing_margins, sequence_of_trajectory, with_features
from dmr_pipeline.router.policies import Observed, by_the_rules_of, in_the_order_of, routing_policy
from dmr_pipeline.router.probe import ProbeHead

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

LOG = pl.Schema(
    {
        "update": pl.Int64,
        "reward": pl.Float64,
        "success": pl.Float64,
        "ratio": pl.Float64,
        "cost": pl.Float64,
        "tied_groups": pl.Float64,
        "refilled_groups": pl.Float64,
        "entropy": pl.Float64,
        "price": pl.Float64,
        "divergence": pl.Float64,
        "validation_reward": pl.Float64,
        "validation_success": pl.Float64,
        "validation_ratio": pl.Float64,
        "validation_cost": pl.Float64,
    }
)
"""One row an update, from 0. The first columns are of the episodes that the update learned from (null at update 0):
means, the share of groups whose rewards tie and of those that took the place of such, the entropy of a decision and KL(router ||
its start) in nats a decision, and lambda. Means are over the router's own episodes, branches aside. The validation columns are
of the router after the update, acting at its threshold (null between validations). `ratio` is the mean spend of all steps (of two
rungs the high-precision ratio, see `ActingModels.spend`)."""

SESSION = "session.pt"
"""In a checkpoint's folder: what the trainer does not keep, and the hashes of what it does."""

_BATCH = 16
"""Episodes in one forward pass of the router at its start."""
_CERTAIN = 0.01
"""Of the entropy of an even choice: below it a router has collapsed."""


@dataclass(frozen=True)
class Scorer:
    """Scores episodes of a router of a given size."""

    rollouts: Rollouts
    router: PassBytes
    section: GrpoRouter

    def cost(self, trajectory: Trajectory) -> float:
        return self.rollouts.cost(trajectory, self.router).total

    def reward(self, trajectory: Trajectory, price: float) -> float:
        """At lambda = price."""
        budget = self.section.budget
        priced = self.spend(trajectory) if budget is not None and budget.ratio is not None else self.cost(trajectory)
        return reward(trajectory.success, priced, self.section, price)

    def spend(self, trajectory: Trajectory) -> float:
        return float(np.mean([self.rollouts.acting.spend[step.precision] for step in trajectory.steps]))

    def earned(self, trajectory: Trajectory, price: float) -> float:
        """What a sampled episode is credited with: its reward, and the surprise of its decisions, whose mean is their entropy."""
        surprises = [
            -math.log(chances(np.array(step.exceedance))[self.rollouts.route.index(step.precision)])
            for step in trajectory.steps
            if self.section.entropy_weight and not step.forced
        ]
        bonus = self.section.entropy_weight * float(np.mean(surprises)) if surprises else 0.0
        return self.reward(trajectory, price) + bonus

    def means(self, played: Sequence[Trajectory], price: float) -> dict[str, float]:
        steps = [step for trajectory in played for step in trajectory.steps]
        return {
            "reward": float(np.mean([self.reward(trajectory, price) for trajectory in played])),
            "success": float(np.mean([trajectory.success for trajectory in played])),
            "ratio": float(np.mean([self.rollouts.acting.spend[step.precision] for step in steps])),
            "cost": float(np.mean([self.cost(trajectory) for trajectory in played])),
        }


def settings_at_ratio(router: Router, scorer: Scorer, games: Sequence[Task], scratch: Path) -> RouterSettings:
    """Stage 1's settings, its scores tilted by the rungs' spend so that the mean spend is `initial_ratio`, over the steps of one
    episode of each game that mixes the dearest and the cheapest precision at that ratio, forced steps aside. A resumed run reads
    what it found before."""
    section, saved, rollouts = scorer.section, scratch / "start.pt", scorer.rollouts
    route, acting = rollouts.route, rollouts.acting
    found = load_state(saved)
    if found is not None:
        return RouterSettings.model_validate(found)
    policy = by_the_rules_of(router, RandomMixing(two_way_shares(route, section.initial_ratio), section.seed))
    numbers = isinstance(router.model, ProbeHead) and bool(router.model.config.features)
    if numbers:
        policy = in_the_order_of(router, Observed(router, policy))
    with Bars(TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
        progress.add_task(f"episodes to start from a spend of {section.initial_ratio:.2f}", total=None)
        played = rollouts.play([RolloutRequest(game) for game in games], policy, section.seed)
    sequences = [sequence_of_trajectory(trajectory, router) for trajectory in played]
    if not numbers:
        sequences = with_features(router, sequences, _BATCH, rollouts.processes, rollouts.sharing)
    asked = [not step.forced for trajectory in played for step in trajectory.steps]
    margins = np.concatenate(routing_margins(router, sequences, _BATCH))[asked]
    spend = np.array([acting.spend[rung] for rung in router.settings.upper])
    # The dearest rung's score begins without an offset: which one it gets is what is looked for.
    shifts = np.array(router.settings.shifts)
    shifts = shifts - spend * shifts[-1]
    tilt = tilt_for(router.settings.scale * margins + shifts, spend, section.initial_ratio)
    offsets = router.settings.named((shifts + tilt * spend).tolist())
    settings = router.settings.model_copy(update={"offsets": offsets, "threshold": 0.5, "target_ratio": None})
    save_state(saved, settings.model_dump(mode="json"))
    return settings


def tilt_for(scores: Floats, spend: Floats, ratio: float) -> float:
    """The tilt at which the mean spend of softmax(0, score_k + tilt * spend_k ...) is `ratio`.

    Args:
        scores: [steps, rungs - 1], of all rungs but the cheapest, whose score is 0.
        spend: of the same rungs, as `ActingModels.spend`.

    Raises:
        UserError: the ratio is 0 or 1, which no tilt gives.
    """
    if not 0 < ratio < 1:
        raise UserError(f"grpo_router.initial_ratio: {ratio} leaves nothing to sample; choose one between 0 and 1")

    def excess(tilt: float) -> float:
        return float((shares(by_rung(scores + tilt * spend)).T @ spend).mean() - ratio)

    centre = np.log(ratio / (1 - ratio))
    low, high = centre - scores.max() - 1, centre - scores.min() + 1
    while excess(low) > 0:  # of two rungs, every probability is on one side of the ratio at either end
        low -= high - low
    while excess(high) < 0:
        high += high - low
    return float(brentq(excess, low, high))


def divergence(levels: Floats, start: Floats) -> Floats:
    """KL between two choices of precision, in nats a step.

    Args:
        levels: `Decision.exceedance` of the one, [steps, rungs - 1].
        start: scores of the other, [steps, rungs - 1], of all rungs but the cheapest, whose score is 0, in the order of logits.
    """
    s = by_rung(start)[::-1]  # dearest first
    p = chances(levels).T
    surprise = [np.logaddexp(0, rest_of(s, k) - s[k]) for k in range(len(s))]
    result: Floats = (p * surprise).sum(0) + xlogy(p, p).sum(0)
    return result


def entropy(levels: Floats) -> Floats:
    """Of choices of precision, in nats.

    Args:
        levels: `Decision.exceedance`, [steps, rungs - 1].
    """
    p = chances(levels).T
    result: Floats = -xlogy(p, p).sum(0)
    return result


def next_price(price: float, spent: float, section: GrpoRouter) -> float:
    """Lambda after an update: a step of dual ascent. It is 0 at least, and with the gated reward 1 at most, where a game
    that is won at the price of always-high is worth as little as a lost one.

    Args:
        spent: in the update's episodes, on average, of what the budget is of.
    """
    assert section.budget is not None
    budget = section.budget.cost if section.budget.ratio is None else section.budget.ratio
    assert budget is not None
    highest = 1.0 if section.reward == "gated" else math.inf
    return min(max(price + section.budget.rate * (spent - budget), 0.0), highest)


def merit_within(means: Mapping[str, float], budget: GrpoBudget) -> float:
    """By which the best weights are chosen: success within the budget; outside of it less, minus what it is exceeded by.

    Args:
        means: as `Scorer.means` has them.
    """
    over = means["cost"] - budget.cost if budget.cost is not None else means["ratio"] - (budget.ratio or 0.0)
    return means["success"] if over <= 0 else -over


def game_order(task_ids: Sequence[str], number: int, seed: int) -> list[str]:
    """`number` tasks: all of them in random order, then all in another one, and so on; none where there is none."""
    if not task_ids:
        return []
    passes = (seeded_generator("grpo-games", seed, i).permutation(len(task_ids)) for i in count())
    return [task_ids[i] for i in islice((i for order in passes for i in order), number)]


class Session(TrainerCallback):
    """What goes on around the trainer's steps: rollouts, log, validation, best weights, and what a resumed run needs.

    Args:
        router: the one that is trained, in place.
        start: its frozen start.
    """

    def __init__(
        self, router: Router, start: Router, scorer: Scorer, games: Sequence[Task], validation: Sequence[Task]
    ) -> None:
        self.router, self.start, self.scorer, self.validation = router, start, scorer, validation
        self.games = {game.task_id: game for game in games}
        self.section = scorer.section
        self.known = Known()
        """On validation games, where only what the router does counts and no probability is kept."""
        self.rows: list[dict[str, Any]] = []
        self.best_weights: Mapping[str, Tensor] = {}
        self.best_update, self.best_merit = 0, float("-inf")
        self.progress = training_bars()
        self.bar = self.progress.add_task("training by GRPO", total=self.section.updates, note="")

    def log(self) -> pl.DataFrame:
        return pl.DataFrame(self.rows, schema=LOG)

    @property
    def price(self) -> float:
        """Lambda, by what has been spent in the updates so far."""
        section, last = self.section, self.rows[-1] if self.rows else {"update": 0}
        if section.budget is None or last["update"] == 0:
            return section.cost_weight
        return next_price(last["price"], last["cost"] if section.budget.ratio is None else last["ratio"], section)

    def rollouts(self, update: int, task_ids: Sequence[str]) -> list[Rollout]:
        """The trainer's `RolloutFunction`; every draw is seeded by (seed, update, game, member, turn)."""
        section, rollouts, price, known = self.section, self.scorer.rollouts, self.price, Known()
        games = [self.games[task_id] for task_id in task_ids[:: section.group_size]]
        seed = int(seeded_generator("grpo", section.seed, update).integers(2**62))

        def play(runs: Sequence[RolloutRequest]) -> list[Trajectory]:
            policy = routing_policy(self.router, rollouts.slots(len(runs)), sample=True, seed=seed)
            return rollouts.play(runs, policy, seed, known=known)

        def play_some(some: Sequence[Task], branched: Sequence[bool]) -> list[Group]:
            earned = partial(self.scorer.earned, price=price)
            return play_groups(some, branched, section.group_size, rollouts.route, play, earned, seed)

        groups = first = play_some(games, [i >= len(games) - section.branch_groups for i in range(len(games))])
        if section.refills:
            others = game_order([game for game in self.games if game not in task_ids], len(self.games), seed)
            spare = iter(dict.fromkeys(others))
            for _ in range(section.refills):
                tied = sum(group.tied for group in groups)
                groups = refilled(groups, [self.games[task_id] for task_id in islice(spare, tied)], play_some)
        members = [episode for group in groups for episode in group.episodes]
        sampled = [episode for group in groups for episode in group.sampled]
        steps = [step for trajectory in sampled for step in trajectory.steps]
        levels, asked = np.array([step.exceedance for step in steps]), [not step.forced for step in steps]
        row = {
            "update": update,
            **self.scorer.means(sampled, price),
            "tied_groups": float(np.mean([group.tied for group in groups])),
            "refilled_groups": float(np.mean([one is not other for one, other in zip(first, groups, strict=True)])),
            "entropy": float(entropy(levels)[asked].mean()),
            "price": price,
            "divergence": float(divergence(levels, self._scores_of_start(sampled))[asked].mean()),
        }
        self.rows.append(row)
        note = f"reward {row['reward']:.3f}, ratio {row['ratio']:.2f}, ties {row['tied_groups']:.0%}"
        self.progress.update(self.bar, completed=update, note=note)
        sequences = [sequence_of_trajectory(trajectory, self.router) for trajectory in members]
        rewards = [reward for group in groups for reward in group.rewards]
        untrained = [turns for group in groups for turns in group.untrained]
        return [Rollout(*parts) for parts in zip(sequences, rewards, untrained, strict=True)]

    def _scores_of_start(self, played: Sequence[Trajectory]) -> Floats:
        """Of the router that training began with, at all steps: [steps, rungs - 1]."""
        settings = self.start.settings
        sequences = [sequence_of_trajectory(trajectory, self.router) for trajectory in played]
        scores: Floats = (
            settings.scale * np.concatenate(routing_margins(self.start, sequences, _BATCH)) + settings.shifts
        )
        return scores

    def validate(self, update: int) -> None:
        """Log how the router acts at its threshold, and keep its weights if none were better."""
        runs = [RolloutRequest(game) for game in self.validation]
        policy = routing_policy(self.router, self.scorer.rollouts.slots(len(runs)))
        played = self.scorer.rollouts.play(runs, policy, self.section.seed, known=self.known)
        means = self.scorer.means(played, self.price)
        self.rows[-1] |= {f"validation_{name}": value for name, value in means.items()}
        merit = means["reward"] if self.section.budget is None else merit_within(means, self.section.budget)
        if merit > self.best_merit:
            self.best_update, self.best_merit = update, merit
            weights = self.router.model.state_dict()
            self.best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if not self.rows:
            self.rows.append({"update": 0})
            self.validate(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        update, unfinished = divmod(state.global_step, self.section.iterations)
        if unfinished:
            return
        collapsed = self.rows[-1]["entropy"] < _CERTAIN * math.log(len(self.scorer.rollouts.route))
        if update % self.section.validate_every == 0 or update == self.section.updates or collapsed:
            self.validate(update)
        if collapsed:
            log.warning(
                "after update %d of %d every decision is certain (ratio %.2f), and nothing more can be learned: the training"
                " ends. Keep the choice open with grpo_router.entropy_weight or beta, or set learning_rate lower",
                update,
                self.section.updates,
                self.rows[-1]["ratio"],
            )
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """After the trainer has saved its own state: the checkpoint is complete once `session.pt` is there."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        best = {"update": self.best_update, "merit": self.best_merit, "weights": self.best_weights}
        save_state(folder / SESSION, {"rows": self.rows, "best": best, "files": _trainers_files(folder)})

    def resume(self, saved: Mapping[str, Any]) -> None:
        self.rows, best = saved["rows"], saved["best"]
        self.best_update, self.best_merit, self.best_weights = best["update"], best["merit"], best["weights"]


def train(session: Session, section: GrpoRouter, scratch: Path) -> None:
    """Train `session.router` from its start, or from the last complete checkpoint of a killed run."""
    order = game_order(list(session.games), section.updates * section.games_per_update, section.seed)
    with _quiet(), session.progress:
        trainer = RoutingTrainer(session.router, order, session.rollouts, section, scratch, [session])
        checkpoint = last_checkpoint(scratch)
        if checkpoint is not None:
            session.resume(checkpoint.session)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))


@dataclass(frozen=True)
class Checkpoint:
    """What a killed run left: the trainer's own files, and the session's state."""

    folder: Path
    session: Mapping[str, Any]


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The last one that is complete and undamaged; a damaged one is dropped."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{SESSION}")]
    for checkpoint in sorted(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        session = load_state(checkpoint / SESSION)
        if session is None:
            continue
        if session["files"] == _trainers_files(checkpoint):
            return Checkpoint(checkpoint, session)
        discard(checkpoint / SESSION)
    return None


def _trainers_files(checkpoint: Path) -> dict[str, str]:
    return {relpath: md5 for relpath, md5 in hash_files(checkpoint).items() if Path(relpath).stem != Path(SESSION).stem}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the trainer's warnings about its own settings and its bars for every saved file."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
