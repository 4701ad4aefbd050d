"""`trl.GRPOTrainer` for episodes of many decisions: the routing tokens, a token in fifty, are all that is trained.

An episode is one sequence, prompt (the opening segment) and completion (all the rest). What trl 1.16 does otherwise and
is changed: its log-probabilities are over the full vocabulary, but the policy draws from the routing tokens alone,
scaled and shifted; it pads on the left and forwards the padding, which is taken out here; by default it divides rewards
by a group's standard deviation, which would cancel the cost's weight in groups that succeed throughout.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from dmr_pipeline.recipe.grpo_router import GrpoRouter
from dmr_pipeline.router.model import Router, RouterSettings, RoutingSequence, log_probabilities, routing_logits


@dataclass(frozen=True)
class Rollout:
    """One played episode, as it is learned from."""

    sequence: RoutingSequence
    reward: float
    forced: frozenset[int] = frozenset()
    """Steps, from 0, at which the router was not asked: nothing is learned there."""


RolloutFunction = Callable[[int, list[str]], list[Rollout]]
"""(update, from 1; task ids, each repeated for every member of its group) -> one episode each, in their order, sampled
from exactly the router's present weights."""


class RoutingTrainer(GRPOTrainer):
    """Trains the weights of `router.model` in place; scale and offsets stay as they are.

    An update is `iterations` optimizer steps on the episodes just sampled; the importance ratio is 1 at the first. The loss
    is a mean over the routing tokens of the update's episodes, each weighted by its episode's advantage: reward minus
    the group's mean (`dapo`; `dr_grpo` would divide by the length of completions of which few tokens are trained).

    Args:
        router: with beta > 0, loaded from the folder in which trl finds the reference model.
        task_ids: of every update's games, one after the other.
        folder: checkpoints to resume from.
    """

    def __init__(
        self,
        router: Router,
        task_ids: Sequence[str],
        rollouts: RolloutFunction,
        section: GrpoRouter,
        folder: Path,
        callbacks: list[TrainerCallback],
    ) -> None:
        self._settings = router.settings
        self._features: dict[tuple[int, ...], Tensor] = {}
        """What a probe decides on in the episodes of this update, by their tokens."""

        def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
            played = rollouts(trainer.state.global_step // section.iterations + 1, prompts)
            sequences = [rollout.sequence for rollout in played]
            self._features = {tuple(s.tokens): s.features for s in sequences if s.features is not None}
            trainer.model.train()  # trl asks it for the mode, and acting has put it into evaluation mode
            return as_completions(played)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(
                model=router.model,
                reward_funcs=[_given_reward],
                args=training_arguments(section, folder, router.model.device),
                train_dataset=Dataset.from_dict({"prompt": list(task_ids)}),
                processing_class=router.tokenizer,
                rollout_func=rollout_func,
                callbacks=callbacks,
            )
        self.remove_callback(PrinterCallback)

    def _get_per_token_logps_and_entropies(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: object,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probabilities and entropies [episodes, logits_to_keep] of the routing tokens; 0 elsewhere."""
        batch_size = batch_size or len(input_ids)
        parts = [
            routing_log_probs(model, ids, mask, logits_to_keep, self._settings, self._features)
            for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
        ]
        log_probabilities, entropies = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return log_probabilities, entropies if compute_entropy else None, None


def training_arguments(section: GrpoRouter, folder: Path, device: torch.device) -> GRPOConfig:
    arguments = GRPOConfig(
        output_dir=str(folder),
        seed=section.seed,
        max_steps=section.updates * section.iterations,
        learning_rate=section.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=section.beta,
        loss_type="dapo",
        scale_rewards="none",
        num_iterations=section.iterations,
        epsilon=section.clip,
        num_generations=section.group_size,
        per_device_train_batch_size=section.group_size,
        gradient_accumulation_steps=section.games_per_update,
        shuffle_dataset=False,
        use_cpu=device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        save_steps=section.validate_every * section.iterations,
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = 1  # of several that there are: for all of them trl wants a process each
    return arguments


def as_completions(played: Sequence[Rollout]) -> dict[str, Any]:
    """What trl wants of its `rollout_func`: `env_mask` is 1 where a token is trained, reward functions get `reward`."""
    starts = [rollout.sequence.positions[0] + 1 for rollout in played]
    masks = []
    for rollout, start in zip(played, starts, strict=True):
        mask = [0] * (len(rollout.sequence.tokens) - start)
        for turn, position in enumerate(rollout.sequence.positions):
            mask[position + 1 - start] = int(turn not in rollout.forced)
        masks.append(mask)
    return {
        "prompt_ids": [rollout.sequence.tokens[:start] for rollout, start in zip(played, starts, strict=True)],
        "completion_ids": [rollout.sequence.tokens[start:] for rollout, start in zip(played, starts, strict=True)],
        "logprobs": None,  # trl would use them only to correct for vLLM's rounding
        "env_mask": masks,
        "reward": [rollout.reward for rollout in played],
    }


def routing_log_probs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion: int,
    settings: RouterSettings,
    features: Mapping[tuple[int, ...], Tensor],
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats) of the choice between the routing tokens, at those among the last
    `completion` positions: float32 [rows, completion], 0 at all other tokens.

    Args:
        input_ids: int64 [rows, width], padded on either side.
        attention_mask: [rows, width], 0 at padding.
        features: a row's tokens -> what a probe decides on there; an LM needs none.
    """
    columns = input_ids.new_tensor(settings.columns)
    routing = torch.isin(input_ids, columns) & attention_mask.bool()
    routing[:, : input_ids.shape[1] - completion] = False
    sequences = []
    for ids, mask, routed in zip(input_ids, attention_mask.bool(), routing, strict=True):
        positions = routed[mask].nonzero().flatten() - 1
        acted = (ids[routed][:, None] == columns).long().argmax(1)
        tokens = ids[mask].tolist()
        sequences.append(RoutingSequence(tokens, positions.tolist(), acted.tolist(), features.get(tuple(tokens))))
    by_rung = log_probabilities(settings.scores(routing_logits(model, sequences, settings)))
    acted = (input_ids[routing][:, None] == columns).long().argmax(1)
    spread = by_rung.new_zeros(input_ids.shape)
    taken = spread.masked_scatter(routing, by_rung.gather(1, acted[:, None])[:, 0])
    entropies = spread.masked_scatter(routing, -(by_rung.exp() * by_rung).sum(1))
    return taken[:, -completion:], entropies[:, -completion:]


def _given_reward(reward: list[float], **_: object) -> list[float]:
    """The rollouts bring their rewards along."""
    return reward
