"""Stage 1 of the router: class-weighted cross-entropy on the sensitivity labels, or the advantages of advantage.py.

The first is the paper's loss, for any number of rungs; the rest is ours. It is taken over the routing tokens alone, at every step
of the router_train and the ingested trajectories. Held out by game: calibration (Platt), quality and threshold come from
validation games, without the search steps where these are forced (see search_steps.py). The training resumes after a kill with
the same result.
"""

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmr_pipeline.artifacts.resume import load_state, save_state
from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.webshop.benchmark import SEARCH
from dmr_pipeline.errors import UserError
from dmr_pipeline.progress import Bars, training_bars
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.kl_router import KlRouter, RouterModel
from dmr_pipeline.recipe.model import Lora
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import RoutingPolicy
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.calibration import Floats, OperatingPoint, find_threshold
from dmr_pipeline.router.labels import divergence_column, label, measure, step_classes
from dmr_pipeline.router.model import (
    Router,
    RouterSettings,
    RoutingSequence,
    new_router,
    routing_logits,
    routing_margins,
    sequences_of_steps,
    with_features,
    with_numbers,
)
from dmr_pipeline.router.policies import by_the_rules_of, routing_policy

log = logging.getLogger(__name__)

ROUTER_FOLDER = "router"


def labels_of_steps(steps: pl.DataFrame, sensitivity: pl.DataFrame, route: Sequence[str]) -> list[list[int]]:
    """For each episode of the steps, in their order: the class of each step, as `step_classes` has it.

    Raises:
        UserError: a step has no label.
    """
    key = ["episode_id", "turn"]
    classes = step_classes(sensitivity, route)
    joined = steps.select(key).join(classes, on=key, how="left", maintain_order="left")
    missing = joined["rung"].null_count()
    if missing:
        raise UserError(
            f"sensitivity_dataset: {missing} of {len(steps)} steps of the trajectories have no label; make it anew"
        )
    return joined.group_by("episode_id", maintain_order=True).agg("rung")["rung"].to_list()


def search_summary(steps: pl.DataFrame, sensitivity: pl.DataFrame, recipe: Recipe, tau: float) -> dict[str, Any]:
    """Whether search steps are forced from now on, and why: mean divergences in nats. Empty where no command is a search.

    Args:
        steps: `rollout.tables.STEPS`.
        sensitivity: `labels.STEPS`, of these steps.

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


def untrained(section: RouterModel, rollouts: Rollouts, seed: int) -> Router:
    """`new_router` between these rungs, for their transcripts."""
    acting = rollouts.acting
    return new_router(
        section,
        rollouts.route,
        rollouts.prompter.tokenizer,
        seed,
        rollouts.device,
        acting.models[acting.cheapest],
        rollouts.capacity + rollouts.step_limit,
    )


def with_settings(router: Router, **changes: Any) -> Router:  # noqa: ANN401 - as `RouterSettings` has them
    return replace(router, settings=RouterSettings.model_validate(router.settings.model_dump() | changes))


def calibrate_threshold(
    router: Router,
    levels: Floats,
    target: float,
    games: Sequence[Task],
    rollouts: Rollouts,
    seed: int,
    clock: Timings,
    known: Known,
) -> tuple[Router, OperatingPoint, list[OperatingPoint]]:
    """The router at the threshold that gives at most the target spend in closed loop on these games (`find_threshold`).

    Args:
        levels: exceedances at steps that the router may be asked at, to start from.

    Returns:
        Beside it, how it then acts, and all thresholds that were tried.
    """

    def play_at(value: float) -> OperatingPoint:
        policy = routing_policy(with_settings(router, threshold=value), rollouts.slots(len(games)))
        played = play_games(games, policy, rollouts, seed, f"router at threshold {value:.3f}", clock, known)
        return OperatingPoint.of(value, played, rollouts.acting.spend)

    point, tried = find_threshold(play_at, levels, target)
    return with_settings(router, threshold=point.threshold, target_ratio=target), point, tried


def class_weights(labels: Sequence[Sequence[int]], classes: int) -> list[float]:
    """Weights of a step by its class: inverse to the frequencies of the classes, 1 in the mean; as if a class that no step has
    had one.

    Raises:
        UserError: all steps are of one class.
    """
    counts = Counter(y for episode in labels for y in episode)
    steps = counts.total()
    if len(counts) == 1:
        above = steps - counts[0]
        raise UserError(
            f"kl_router: {above} of {steps} steps ask for more than the cheapest rung, there is nothing to tell apart;"
            " set another sensitivity.quantile or tau"
        )
    return [steps / (classes * max(counts[y], 1)) for y in range(classes)]


def routing_loss(logits: Tensor, classes: Tensor, weights: Sequence[float]) -> Tensor:
    """Mean over the steps of weight times cross-entropy, in nats.

    Args:
        logits: of the routing tokens, cheapest first, float [steps, rungs].
        classes: int64 [steps].
    """
    losses = torch.nn.functional.cross_entropy(logits, classes, logits.new_tensor(weights), reduction="none")
    return losses.mean()


def train(
    router: Router,
    sequences: Sequence[RoutingSequence],
    labels: Sequence[Sequence[int]],
    section: KlRouter,
    scratch: Path,
    held: Collection[int] = (),
) -> tuple[Router, pl.DataFrame]:
    """Train on classes, arguments as of `fit`.

    Returns:
        The router with the class weights undone: they shift the optimal margin z of class k by log(w_k / w_0), so its offset is
        minus that. And the loss of every update.
    """
    learned = [its for i, its in enumerate(labels) if i not in held]
    weights = class_weights(learned, len(router.settings.route))
    classes = [torch.tensor(its) for its in labels]
    router, log = fit(router, sequences, classes, lambda z, y: routing_loss(z, y, weights), section, scratch, held)
    offsets = router.settings.named([math.log(weights[0] / weight) for weight in weights[1:]])
    return with_settings(router, offsets=offsets), log


def fit(
    router: Router,
    sequences: Sequence[RoutingSequence],
    targets: Sequence[Tensor],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    section: KlRouter,
    scratch: Path,
    held: Collection[int] = (),
) -> tuple[Router, pl.DataFrame]:
    """Train, from where a killed run stopped if one did (at an epoch's start).

    Args:
        targets: of each sequence, a row a step.
        loss_of: mean loss of logits [steps, rungs], cheapest first, and their targets.
        held: sequences, by their place, that are not trained on. If there are any, the weights of the epoch whose loss is least
            on them are kept.

    Returns:
        The router, and the loss of every update.
    """
    adapters = add_adapters(router, section.model.lora, section.seed) if section.model.lora is not None else None
    model, device = router.model, router.model.device
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decay = 0.01 if section.weight_decay is None else section.weight_decay
    optimizer = torch.optim.AdamW(trained.values(), lr=section.learning_rate, weight_decay=decay)
    epoch, losses, best = 0, list[float](), _Best()
    saved = scratch / "training.pt"
    state = load_state(saved, device)
    if state is not None:
        epoch, losses, best = state["epoch"], state["losses"], _Best(**state.get("best", {}))
        optimizer.load_state_dict(state["optimizer"])
        _put(trained, state["weights"])
    learned = [i for i in range(len(sequences)) if i not in held]
    total = section.epochs * math.ceil(len(learned) / section.batch_episodes)

    def loss_on(batch: Sequence[int]) -> Tensor:
        logits = routing_logits(model, [sequences[i] for i in batch], router.settings)
        return loss_of(logits, torch.cat([targets[i] for i in batch]).to(device))

    def recent_loss() -> float:
        return float(np.mean(losses[-20:])) if losses else math.nan

    with training_bars("loss {task.fields[loss]:.3f}") as progress:
        bar = progress.add_task("training the router", total=total, completed=len(losses), loss=recent_loss())
        while epoch < section.epochs:
            model.train()
            rng = random.Random(f"kl-router-{section.seed}-{epoch}")
            torch.manual_seed(
                section.seed + epoch
            )  # of dropout, in models that have it, so that a resumed run is the same
            for places in batches_by_length([sequences[i] for i in learned], section.batch_episodes, rng):
                for group in optimizer.param_groups:
                    group["lr"] = section.learning_rate * (1 - len(losses) / total)
                loss = loss_on([learned[place] for place in places])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                losses.append(loss.item())
                progress.update(bar, completed=len(losses), loss=recent_loss())
            epoch += 1
            values = {name: parameter.detach() for name, parameter in trained.items()}
            if held:
                best = best.or_after(epoch, _mean_loss(model, sorted(held), targets, loss_on, section), values)
            state = {"epoch": epoch, "losses": losses, "optimizer": optimizer.state_dict(), "weights": values}
            save_state(saved, state | ({"best": vars(best)} if held else {}))
    if held:
        _put(trained, best.weights)
        log.info("the weights after epoch %d of %d are best on the games held out", best.epoch, section.epochs)
    if adapters is not None:
        model = adapters.merge_and_unload()
    table = pl.DataFrame(
        {"update": range(1, total + 1), "loss": losses}, schema={"update": pl.Int64, "loss": pl.Float64}
    )
    return replace(router, model=model.eval()), table


@dataclass(frozen=True)
class _Best:
    """The weights of the epoch whose loss is least on what is held out."""

    epoch: int = 0
    loss: float = math.inf
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def or_after(self, epoch: int, loss: float, weights: Mapping[str, Tensor]) -> "_Best":
        if loss >= self.loss:
            return self
        return _Best(epoch, loss, {name: value.clone() for name, value in weights.items()})


def _put(trained: Mapping[str, torch.nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            trained[name].copy_(value)


@torch.no_grad()
def _mean_loss(
    model: PreTrainedModel,
    held: Sequence[int],
    targets: Sequence[Tensor],
    loss_on: Callable[[Sequence[int]], Tensor],
    section: KlRouter,
) -> float:
    """Of the steps of these sequences."""
    model.eval()
    batches = [held[first : first + section.batch_episodes] for first in range(0, len(held), section.batch_episodes)]
    steps = [sum(len(targets[i]) for i in batch) for batch in batches]
    return float(np.average([loss_on(batch).item() for batch in batches], weights=steps))


def games_of(steps: pl.DataFrame, episodes: pl.DataFrame) -> list[str]:
    """The task of each episode of these steps, in their order."""
    game = dict(episodes.select("episode_id", "task_id").iter_rows())
    return [game[episode] for episode in steps["episode_id"].unique(maintain_order=True)]


def held_out(games: Sequence[str], share: float, seed: int) -> frozenset[int]:
    """Places of the episodes that are not trained on: all of a share of the games, at least one where there is a share.

    Args:
        games: of each episode, its task.

    Raises:
        UserError: nothing would be left to train on.
    """
    if not share:
        return frozenset()
    names = sorted(set(games))
    if len(names) < 2:
        raise UserError(
            f"kl_router.held_out: {share:g} of the games are to be held out, and the labels have {len(names)}: play more games"
            " (benchmark.splits.router_train), or leave held_out out"
        )
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    return frozenset(i for i, game in enumerate(games) if game in chosen)


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
            target_modules=lora.target_modules,
            trainable_token_indices=dict.fromkeys(names, router.settings.columns),
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


def validate(router: Router, games: Sequence[Task], rollouts: Rollouts, recipe: Recipe, tau: float) -> pl.DataFrame:
    """Labelled steps of games that the router has not seen, but for those that are forced: the columns of `step_classes`, and
    `margins`, the router's."""
    seed, route = recipe.kl_router.seed, rollouts.route
    # The router should meet the states of all rungs.
    mixing = by_the_rules_of(router, RandomMixing(dict.fromkeys(route, 1 / len(route)), seed))
    played = play_games(games, mixing, rollouts, seed, "episodes to calibrate on", Timings())
    episodes, steps = to_frames(played, "validation")
    with Bars() as progress:
        bar = progress.add_task("their labels", total=len(steps))
        counted = recipe.sensitivity.tokens
        rows, drafts = measure(rollouts, episodes, steps, counted, lambda n: progress.advance(bar, n))
    batch = recipe.kl_router.batch_episodes
    sequences = with_features(
        router, sequences_of_steps(steps, router.settings), batch, rollouts.processes, rollouts.sharing
    )
    sequences = with_numbers(router, sequences, steps, drafts, rollouts.prompter.command)
    margins = routing_margins(router, sequences, batch)
    flat = pl.Series(np.concatenate(margins).tolist(), dtype=pl.List(pl.Float64))
    asked = pl.Series([not step.forced for trajectory in played for step in trajectory.steps], dtype=pl.Boolean)
    classes = step_classes(label(rows, recipe.sensitivity, tau), route)
    return classes.with_columns(margins=flat).filter(asked)


def play_games(
    games: Sequence[Task],
    policy: RoutingPolicy,
    rollouts: Rollouts,
    seed: int,
    title: str,
    clock: Timings,
    known: Known | None = None,
) -> list[Trajectory]:
    """One episode of each game under the policy; `known` as in `Rollouts.play`."""
    with Bars() as progress:
        bar = progress.add_task(title, total=len(games))
        return rollouts.play(
            [RolloutRequest(game) for game in games], policy, seed, clock, lambda n: progress.advance(bar, n), known
        )
