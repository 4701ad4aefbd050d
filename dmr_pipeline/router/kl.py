"""Stage 1 of the router: class-weighted cross-entropy on the sensitivity labels.

The paper's loss; the rest is ours. It is taken over the two routing tokens alone, at every step of the router_train and the
ingested trajectories. Held out by game: calibration (Platt), quality and threshold come from validation games, without the
search steps where these are forced (see search_steps.py). The training resumes after a kill with the same result.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from dmr_pipeline.artifacts.resume import load_state, save_state
from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.webshop.benchmark import SEARCH
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import KlRouter, Lora, Recipe
from dmr_pipeline.rollout.engine import Clock, RoutingPolicy, Run, Trajectory
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Ladder
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.calibration import (
    Floats,
    OperatingPoint,
    find_threshold,
)
from dmr_pipeline.router.labels import divergence_column, label, measure
from dmr_pipeline.router.model import (
    Router,
    RouterSettings,
    RoutingSequence,
    routing_logits,
    routing_margins,
    sequences_of_steps,
    with_features,
)
from dmr_pipeline.router.policies import routing_policy

ROUTER_FOLDER = "router"
_VALIDATION_MIX = 0.5
"""Chance of high precision in the episodes whose labels calibrate the router: it should meet the states of both."""


def labels_of_steps(steps: pl.DataFrame, sensitivity: pl.DataFrame) -> list[list[bool]]:
    """For each episode of the steps, in their order: is the step sensitive?

    Raises:
        UserError: a step has no label.
    """
    key = ["episode_id", "turn"]
    joined = steps.select(key).join(sensitivity.select(*key, "sensitive"), on=key, how="left", maintain_order="left")
    missing = joined["sensitive"].null_count()
    if missing:
        raise UserError(
            f"sensitivity_dataset: {missing} of {len(steps)} steps of the trajectories have no label; make it anew"
        )
    return joined.group_by("episode_id", maintain_order=True).agg("sensitive")["sensitive"].to_list()


def search_summary(steps: pl.DataFrame, sensitivity: pl.DataFrame, recipe: Recipe, tau: float) -> dict[str, Any]:
    """Whether search steps are forced from now on, and why: mean divergences in nats. Empty where no command is a search.

    Args:
        steps: `trajectories.STEPS`.
        sensitivity: `sensitivity.STEPS`, of these steps.

    Raises:
        UserError: the recipe forces searches, but there are none.
    """
    searches = pl.col("command").str.starts_with(SEARCH)
    joined = sensitivity.join(steps.select("episode_id", "turn", "command"), on=["episode_id", "turn"])
    divergence = pl.col(divergence_column(recipe.sensitivity))
    search, other = (joined.filter(chosen).select(divergence.mean()).item() for chosen in (searches, ~searches))
    forced = recipe.kl_router.force_search
    if search is None:
        if forced:
            raise UserError(
                f"kl_router.force_search: none of the {len(steps)} labelled steps is a search; leave it out where the"
                " benchmark has no search bar"
            )
        return {}
    return {
        "search_forced": forced and search >= tau,
        "mean_divergence_of_searches": round(search, 5),
        "mean_divergence_of_other_steps": None if other is None else round(other, 5),
    }


def with_settings(router: Router, **changes: float) -> Router:
    return replace(router, settings=RouterSettings.model_validate(router.settings.model_dump() | changes))


def calibrate_threshold(
    router: Router,
    probabilities: Floats,
    target: float,
    games: Sequence[Task],
    ladder: Ladder,
    seed: int,
    clock: Clock,
    known: Known,
) -> tuple[Router, OperatingPoint, list[OperatingPoint]]:
    """The router at the threshold that gives the target ratio in closed loop on these games.

    Args:
        probabilities: P(high) at steps that the router may be asked at, to start from.

    Returns:
        Beside it, how it then acts, and all thresholds that were tried.
    """

    def play_at(value: float) -> OperatingPoint:
        policy = routing_policy(with_settings(router, threshold=value), ladder.slots(len(games)))
        played = play_games(games, policy, ladder, seed, f"router at threshold {value:.3f}", clock, known)
        return OperatingPoint.of(value, played)

    point, tried = find_threshold(play_at, probabilities, target)
    return with_settings(router, threshold=point.threshold, target_ratio=target), point, tried


def class_weights(labels: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Weights of a step that is not sensitive and of one that is: inverse to their frequencies, 1 in the mean.

    Raises:
        UserError: there are no sensitive steps, or no others.
    """
    steps = [y for episode in labels for y in episode]
    positives = sum(steps)
    if positives in (0, len(steps)):
        raise UserError(
            f"kl_router: {positives} of {len(steps)} steps are sensitive, there is nothing to tell apart;"
            " set another sensitivity.quantile or tau"
        )
    return len(steps) / (2 * (len(steps) - positives)), len(steps) / (2 * positives)


def routing_loss(logits: Tensor, sensitive: Tensor, weights: tuple[float, float]) -> Tensor:
    """Mean over the steps of weight times cross-entropy, in nats.

    Args:
        logits: of the routing tokens, low first, float [steps, 2].
        sensitive: bool [steps].
    """
    losses = torch.nn.functional.cross_entropy(logits, sensitive.long(), logits.new_tensor(weights), reduction="none")
    return losses.mean()


def train(
    router: Router,
    sequences: Sequence[RoutingSequence],
    labels: Sequence[Sequence[bool]],
    section: KlRouter,
    scratch: Path,
) -> tuple[Router, pl.DataFrame]:
    """Train, from where a killed run stopped if one did (at an epoch's start).

    Returns:
        The router with the class weights undone: they shift the optimal z by log(w1 / w0), so the offset is minus that.
        And the loss of every update.
    """
    weights = class_weights(labels)
    adapters = add_adapters(router, section.model.lora, section.seed) if section.model.lora is not None else None
    model, device = router.model, router.model.device
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=section.learning_rate)
    epoch, losses = 0, list[float]()
    saved = scratch / "training.pt"
    state = load_state(saved, device)
    if state is not None:
        epoch, losses = state["epoch"], state["losses"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, value in state["weights"].items():
                trained[name].copy_(value)
    total = section.epochs * math.ceil(len(sequences) / section.batch_episodes)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        bar = progress.add_task("training the router", total=total, completed=len(losses), loss=float("nan"))
        model.train()
        while epoch < section.epochs:
            rng = random.Random(f"kl-router-{section.seed}-{epoch}")
            for batch in batches_by_length(sequences, section.batch_episodes, rng):
                for group in optimizer.param_groups:
                    group["lr"] = section.learning_rate * (1 - len(losses) / total)
                logits = routing_logits(model, [sequences[i] for i in batch], router.settings)
                sensitive = torch.tensor([y for i in batch for y in labels[i]], device=device)
                loss = routing_loss(logits, sensitive, weights)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                losses.append(loss.item())
                progress.update(bar, completed=len(losses), loss=float(np.mean(losses[-20:])))
            epoch += 1
            values = {name: parameter.detach() for name, parameter in trained.items()}
            state = {"epoch": epoch, "losses": losses, "optimizer": optimizer.state_dict(), "weights": values}
            save_state(saved, state)
    if adapters is not None:
        model = adapters.merge_and_unload()
    log = pl.DataFrame({"update": range(1, total + 1), "loss": losses}, schema={"update": pl.Int64, "loss": pl.Float64})
    offset = math.log(weights[0] / weights[1])
    return with_settings(replace(router, model=model.eval()), offset=offset), log


def add_adapters(router: Router, lora: Lora, seed: int) -> PreTrainedModel:
    """Put adapters on the linear layers of the router's model, in place; only they and the routing tokens' rows train.

    Returns:
        peft's model around it, which can merge them.
    """
    from peft import LoraConfig, get_peft_model

    model = router.model
    ends = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        ends.append(model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules="all-linear",
            trainable_token_indices=dict.fromkeys(names, router.settings.tokens),
        ),
    )


def batches_by_length(sequences: Sequence[RoutingSequence], size: int, rng: random.Random) -> list[list[int]]:
    """Indices of sequences of similar length, so that little of a batch is padding; the batches in random order."""
    order = list(range(len(sequences)))
    rng.shuffle(order)
    order.sort(key=lambda i: len(sequences[i].tokens))
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def validate(router: Router, games: Sequence[Task], ladder: Ladder, recipe: Recipe, tau: float) -> pl.DataFrame:
    """Labelled steps of games that the router has not seen, but for those that are forced: `sensitivity.STEPS`' columns, and
    the router's margin z."""
    seed = recipe.kl_router.seed
    mixing = RandomMixing(_VALIDATION_MIX, seed, router.settings.force_search)
    played = play_games(games, mixing, ladder, seed, "episodes to calibrate on", Clock())
    episodes, steps = to_frames(played, "validation")
    with Progress() as progress:
        bar = progress.add_task("their labels", total=len(episodes))
        rows = measure(ladder, episodes, steps, ladder.rows, lambda n: progress.advance(bar, n))
    batch = recipe.kl_router.batch_episodes
    sequences = with_features(router, sequences_of_steps(steps, router.settings), batch, ladder.processes)
    margins = routing_margins(router, sequences, batch)
    flat = pl.Series([z for episode in margins for z in episode], dtype=pl.Float64)
    asked = pl.Series([not step.forced for trajectory in played for step in trajectory.steps], dtype=pl.Boolean)
    return label(rows, recipe.sensitivity, tau).with_columns(margin=flat).filter(asked)


def play_games(
    games: Sequence[Task],
    policy: RoutingPolicy,
    ladder: Ladder,
    seed: int,
    title: str,
    clock: Clock,
    known: Known | None = None,
) -> list[Trajectory]:
    """One episode of each game under the policy; `known` as in `Ladder.play`."""
    with Progress() as progress:
        bar = progress.add_task(title, total=len(games))
        return ladder.play(
            [Run(game) for game in games], policy, seed, clock, lambda n: progress.advance(bar, n), known
        )
