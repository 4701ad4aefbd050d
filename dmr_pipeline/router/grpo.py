"""Stage 2 of the router: GRPO (Shao et al., 2024) on success and cost.

A group is several episodes of one game by the router that samples; each is credited with its reward minus the group's
mean. The paper's reward is success - lambda * cost; the default, success * (1 - lambda * cost), is ours: cheap failure
must not pay. Ours as well: start from the stage-1 router, shifted to a ratio at which groups do not tie; train all its
weights; keep those that are best on validation games, acting at a threshold of 0.5; then calibrate the threshold to a ratio,
if the recipe names one. The training resumes after a kill with the same result.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.progress import Progress, TextColumn, TimeElapsedColumn
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
from dmr_pipeline.progress import training_progress
from dmr_pipeline.recipe import GrpoRouter
from dmr_pipeline.rollout.cost import reward
from dmr_pipeline.rollout.engine import RolloutRequest, Trajectory, seeded_generator
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.router.baselines import RandomMixing, two_way_shares
from dmr_pipeline.router.calibration import by_rung, rest_of, shares
from dmr_pipeline.router.grpo_trainer import Rollout, RoutingTrainer
from dmr_pipeline.router.model import (
    Router,
    RouterSettings,
    routing_margins,
    sequence_of_trajectory,
    with_features,
)
from dmr_pipeline.router.policies import Observed, by_the_rules_of, in_the_order_of, routing_policy
from dmr_pipeline.router.probe import ProbeHead

Floats = NDArray[np.float64]

LOG = pl.Schema(
    {
        "update": pl.Int64,
        "reward": pl.Float64,
        "success": pl.Float64,
        "ratio": pl.Float64,
        "cost": pl.Float64,
        "tied_groups": pl.Float64,
        "divergence": pl.Float64,
        "validation_reward": pl.Float64,
        "validation_success": pl.Float64,
        "validation_ratio": pl.Float64,
        "validation_cost": pl.Float64,
    }
)
"""One row an update, from 0. The first columns are of the episodes that the update learned from (null at update 0):
means, the share of groups whose rewards tie, and KL(router || its start) in nats a decision. The validation columns are
of the router after the update, acting at its threshold (null between validations). `ratio` is the mean spend of all steps (of two
rungs the high-precision ratio, see `ActingModels.spend`)."""

SESSION = "session.pt"
"""In a checkpoint's folder: what the trainer does not keep, and the hashes of what it does."""

_BATCH = 16
"""Episodes in one forward pass of the router at its start."""


@dataclass(frozen=True)
class Scorer:
    """Scores episodes of a router of a given size."""

    rollouts: Rollouts
    router: PassBytes
    section: GrpoRouter

    def cost(self, trajectory: Trajectory) -> float:
        return self.rollouts.cost(trajectory, self.router).total

    def reward(self, trajectory: Trajectory) -> float:
        return reward(trajectory.success, self.cost(trajectory), self.section)

    def means(self, played: Sequence[Trajectory]) -> dict[str, float]:
        steps = [step for trajectory in played for step in trajectory.steps]
        return {
            "reward": float(np.mean([self.reward(trajectory) for trajectory in played])),
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
    with Progress(TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
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
    p = np.diff(levels.T, axis=0, prepend=0.0, append=1.0)
    surprise = [np.logaddexp(0, rest_of(s, k) - s[k]) for k in range(len(s))]
    result: Floats = (p * surprise).sum(0) + xlogy(p, p).sum(0)
    return result


def game_order(task_ids: Sequence[str], number: int, seed: int) -> list[str]:
    """`number` tasks: all of them in random order, then all in another one, and so on."""
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
        self.best_update, self.best_reward = 0, float("-inf")
        self.progress = training_progress()
        self.bar = self.progress.add_task("training by GRPO", total=self.section.updates, note="")

    def log(self) -> pl.DataFrame:
        return pl.DataFrame(self.rows, schema=LOG)

    def rollouts(self, update: int, task_ids: Sequence[str]) -> list[Rollout]:
        """The trainer's `RolloutFunction`; every draw is seeded by (seed, update, game, member, turn)."""
        members: Counter[str] = Counter()
        runs = []
        for task_id in task_ids:
            runs.append(RolloutRequest(self.games[task_id], members[task_id]))
            members[task_id] += 1
        seed = int(seeded_generator("grpo", self.section.seed, update).integers(2**62))
        rollouts = self.scorer.rollouts
        policy = routing_policy(self.router, rollouts.slots(len(runs)), sample=True, seed=seed)
        played = rollouts.play(runs, policy, seed)
        sequences = [sequence_of_trajectory(trajectory, self.router) for trajectory in played]
        rewards = [self.scorer.reward(trajectory) for trajectory in played]

        settings = self.start.settings
        scores = settings.scale * np.concatenate(routing_margins(self.start, sequences, _BATCH)) + settings.shifts
        steps = [step for trajectory in played for step in trajectory.steps]
        levels, asked = np.array([step.exceedance for step in steps]), [not step.forced for step in steps]
        forced = [frozenset(i for i, step in enumerate(t.steps) if step.forced) for t in played]
        row = {
            "update": update,
            **self.scorer.means(played),
            "tied_groups": float(np.mean(np.ptp(np.reshape(rewards, (-1, self.section.group_size)), axis=1) == 0)),
            "divergence": float(divergence(levels, scores)[asked].mean()),
        }
        self.rows.append(row)
        note = f"reward {row['reward']:.3f}, ratio {row['ratio']:.2f}, ties {row['tied_groups']:.0%}"
        self.progress.update(self.bar, completed=update, note=note)
        return [Rollout(*parts) for parts in zip(sequences, rewards, forced, strict=True)]

    def validate(self, update: int) -> None:
        """Log how the router acts at its threshold, and keep its weights if none were better."""
        runs = [RolloutRequest(game) for game in self.validation]
        policy = routing_policy(self.router, self.scorer.rollouts.slots(len(runs)))
        means = self.scorer.means(self.scorer.rollouts.play(runs, policy, self.section.seed, known=self.known))
        self.rows[-1] |= {f"validation_{name}": value for name, value in means.items()}
        if means["reward"] > self.best_reward:
            self.best_update, self.best_reward = update, means["reward"]
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
        if not unfinished and (update % self.section.validate_every == 0 or update == self.section.updates):
            self.validate(update)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """After the trainer has saved its own state: the checkpoint is complete once `session.pt` is there."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        best = {"update": self.best_update, "reward": self.best_reward, "weights": self.best_weights}
        save_state(folder / SESSION, {"rows": self.rows, "best": best, "files": _trainers_files(folder)})

    def resume(self, saved: Mapping[str, Any]) -> None:
        self.rows, best = saved["rows"], saved["best"]
        self.best_update, self.best_reward, self.best_weights = best["update"], best["reward"], best["weights"]


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
