"""Training the float LLM on the expert's actions: a new one, or one that exists (`finetuning`).

The training is behaviour cloning on expert episodes with some mistakes in them, then DAgger (Ross et al., 2011): the agent's
own episodes with the expert's actions as targets. Loss on action tokens only. It resumes after a kill with the same result.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from dmr_pipeline.agent.logits import decoder_of, logits_of
from dmr_pipeline.agent.memory import halving
from dmr_pipeline.artifacts.resume import load_state, save_state
from dmr_pipeline.environments.base import Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.progress import training_bars
from dmr_pipeline.recipe.agent import TRAINED_TRANSCRIPT_TOKENS, Imitation
from dmr_pipeline.recipe.benchmark import Games
from dmr_pipeline.recipe.model import Architecture
from dmr_pipeline.recipe.runtime import Runtime
from dmr_pipeline.rollout.engine import play_alone
from dmr_pipeline.rollout.kv_cache.choice import positions_of
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.training.examples import IGNORED, Example, demonstration_example, expert_example, relabelled_example

log = logging.getLogger(__name__)

TOKENS_AT_ONCE = {"cpu": 2500, "cuda": 24_000}
"""Tokens in one forward and backward pass, padding included, by type of device: small ones suit a CPU's caches, a GPU is kept
busy by few large ones, as far as its memory goes."""
_SAVED_EVERY = 300
"""Seconds after which resume state is saved again, where updates are slow; it is saved before each collection anyway."""
_EMBEDDING_STD = 0.5
_TRIES = 200
"""Expert episodes that are played for one that is short, at most; with none among them there would be no end."""
_KEPT_EPISODES = 4000
"""The agent's own episodes that are kept for training; older ones, of a worse agent, are dropped."""


def new_model(architecture: Architecture, vocabulary: int, seed: int, positions: int | None = None) -> Qwen3ForCausalLM:
    """A Qwen3-architecture causal LM with random weights, and positions for so many tokens (by default 4,096).

    Embeddings are wide and not tied to the head: with narrow ones (0.02), which Adam soon drags into one common direction,
    the words of a small vocabulary become too alike for attention to find one again.
    """
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=architecture.width,
            num_hidden_layers=architecture.layers,
            num_attention_heads=architecture.heads,
            num_key_value_heads=architecture.key_value_heads,
            head_dim=architecture.head_width,
            intermediate_size=architecture.feed_forward,
            max_position_embeddings=positions or TRAINED_TRANSCRIPT_TOKENS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=_EMBEDDING_STD)
    return model


def success_rate(
    model: PreTrainedModel, tasks: Sequence[Task], prompter: Prompter, benchmark: Games, runtime: Runtime
) -> float:
    """Share of tasks won when the model acts alone, greedily."""
    played = play_alone(model, tasks, prompter, benchmark.step_limit, runtime.batch_episodes)
    return sum(trajectory.success for trajectory in played) / len(played)


@dataclass
class _State:
    """All that a resumed training needs."""

    update: int
    own: list[Example]
    log: list[dict[str, float]]


def train(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    tasks: Sequence[Task],
    prompter: Prompter,
    training: Imitation,
    benchmark: Games,
    runtime: Runtime,
    device: torch.device,
    scratch: Path,
    compute: torch.dtype = torch.float32,
    acting: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
) -> pl.DataFrame:
    """Train those weights of a model on the device that want a gradient, in place, from the start or from where a killed run
    stopped; it is left in evaluation mode.

    Every update draws from a generator seeded by (seed, update), so that a resumed run repeats an unbroken one.

    Args:
        compute: dtype of the matrix products of forward and backward passes (torch's autocast).
        acting: the model that plays, from the one that is trained.

    Returns:
        A row an update (loss, accuracy) and a row a collection of own episodes (success).
    """
    state = _State(0, [], [])
    saved = scratch / "training.pt"
    content = load_state(saved)
    if content is not None:
        with torch.no_grad():
            for name, parameter in trained_weights(model).items():
                parameter.copy_(content["model"][name])
        for optimizer, saved_state in zip(optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        state = _State(content["update"], [Example(**example) for example in content["own"]], content["log"])
    del content
    piece, room = TOKENS_AT_ONCE[device.type], positions_of(model.config)

    def learn_in(most_tokens: int) -> tuple[float, float]:
        nonlocal piece
        piece = most_tokens
        model.zero_grad()
        return learn(model, batch, device, compute, piece)

    tokens, started = 0, time.perf_counter()
    """Read and learned from since the last save, and when that was."""
    with training_bars() as progress:
        bar = progress.add_task("training the agent", total=training.updates, completed=state.update, note="")
        while state.update < training.updates:
            collects = state.update % training.dagger_every == 0
            if collects or time.perf_counter() - started >= _SAVED_EVERY:
                _save(saved, model, optimizers, state)
                if tokens:
                    log.info("update %d: %s", state.update, _note(state.log, tokens / (time.perf_counter() - started)))
                if collects and state.update >= training.dagger_from:
                    own, success = collect_own(acting(model), tasks, prompter, training, runtime, state.update)
                    state.own = (state.own + own)[-_KEPT_EPISODES:]
                    state.log.append({"update": state.update, "success": success})
                tokens, started = 0, time.perf_counter()
            rng = random.Random(f"agent-{training.seed}-{state.update}")
            batch = _batch(tasks, prompter, training, benchmark, state, rng, room)
            model.train()
            # Of dropout, in models that have it, so that a resumed run is the same.
            torch.manual_seed(rng.getrandbits(63))
            loss, accuracy = halving(piece, "tokens of a training batch", learn_in)
            torch.nn.utils.clip_grad_norm_(trained_weights(model).values(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate * schedule(state.update, training)
                optimizer.step()
            tokens += sum(len(example.tokens) for example in batch)
            state.update += 1
            state.log.append({"update": state.update, "loss": loss, "accuracy": accuracy})
            progress.update(
                bar, completed=state.update, note=_note(state.log, tokens / (time.perf_counter() - started))
            )
    model.eval()
    return pl.DataFrame(
        state.log, schema={"update": pl.Int64, "loss": pl.Float64, "accuracy": pl.Float64, "success": pl.Float64}
    )


def trained_weights(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Those that want a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizers(model: PreTrainedModel, training: Imitation) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for embeddings, head and norms; one learning rate serves both.

    Muon learns this task in a fraction of the updates that AdamW takes for it.
    """
    layers = [(name, p) for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    matrices = [p for _, p in layers]
    names = {name for name, _ in layers}
    rest = [p for name, p in model.named_parameters() if name not in names]
    return [
        torch.optim.Muon(
            matrices, lr=training.learning_rate, weight_decay=training.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=training.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def schedule(update: int, training: Imitation) -> float:
    """Factor on the learning rate: linear warm-up, constant, linear decay to 0 over the last 30% of the updates."""
    decay_from = 0.7 * training.updates
    warm = min(1.0, (update + 1) / max(1, training.warmup_updates))
    return warm * min(1.0, (training.updates - update) / (training.updates - decay_from))


def learn(
    model: PreTrainedModel,
    batch: Sequence[Example],
    device: torch.device,
    compute: torch.dtype = torch.float32,
    most_tokens: int | None = None,
) -> tuple[float, float]:
    """Add the gradient of the mean cross-entropy over the batch's trained positions.

    The batch goes through in pieces of similar length, so that little of it is padding.

    Args:
        most_tokens: of a piece, padding included; by default as many as suit the device.

    Returns:
        The mean cross-entropy in nats, and the share of trained positions whose greedy token is the target.
    """
    trained = sum(target != IGNORED for example in batch for target in example.targets)
    loss, right = 0.0, 0
    for piece in pieces_of_similar_length(batch, most_tokens or TOKENS_AT_ONCE[device.type]):
        with torch.autocast(device.type, compute, enabled=compute != torch.float32):
            logits, wanted = trained_logits(model, piece, device)
        cross_entropy = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / trained
        cross_entropy.backward()
        loss += cross_entropy.item()
        right += int((logits.argmax(-1) == wanted).sum())
    return loss, right / trained


def pieces_of_similar_length(batch: Sequence[Example], most_tokens: int) -> list[list[Example]]:
    """The batch by length, cut where a piece would hold more than `most_tokens` with its padding."""
    pieces: list[list[Example]] = [[]]
    for example in sorted(batch, key=lambda example: len(example.tokens)):
        if pieces[-1] and (len(pieces[-1]) + 1) * len(example.tokens) > most_tokens:
            pieces.append([])
        pieces[-1].append(example)
    return pieces


def trained_logits(model: PreTrainedModel, examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 logits [trained positions, vocabulary], example by example in order, and their targets."""
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        targets[row, : len(example.targets)] = torch.tensor(example.targets)
    # Padding is on the right and attention is causal: no mask is needed, and none keeps the fast attention path.
    hidden = decoder_of(model)(input_ids=tokens.to(device), use_cache=False).last_hidden_state
    trained = (targets != IGNORED).to(device)
    return logits_of(model, hidden[trained]), targets.to(device)[trained]


def collect_own(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    prompter: Prompter,
    training: Imitation,
    runtime: Runtime,
    update: int,
) -> tuple[list[Example], float]:
    """The agent plays training tasks greedily; its transcripts come back with the expert's actions as targets."""
    chosen = random.Random(f"dagger-{training.seed}-{update}").choices(tasks, k=training.dagger_episodes)
    played = play_alone(model, chosen, prompter, training.dagger_steps, runtime.batch_episodes)
    examples = [relabelled_example(trajectory, prompter) for trajectory in played]
    return examples, sum(trajectory.success for trajectory in played) / len(played)


def _batch(
    tasks: Sequence[Task],
    prompter: Prompter,
    training: Imitation,
    benchmark: Games,
    state: _State,
    rng: random.Random,
    room: int | None,
) -> list[Example]:
    """Single-step demonstrations alone at first; then a few of them, expert episodes and, once there are some, the agent's own
    episodes, these up to a number of tokens, since a failing agent's are long.

    Args:
        room: tokens that the model has positions for, where that is known; an expert's episode of more is left out.
    """
    if state.update < training.looks_alone_until:
        return [demonstration_example(rng.choice(tasks), prompter, rng) for _ in range(training.looks_per_update)]
    examples = [demonstration_example(rng.choice(tasks), prompter, rng) for _ in range(training.looks_per_update // 4)]
    tokens = 0
    while state.own and tokens < training.dagger_tokens:
        examples.append(rng.choice(state.own))
        tokens += len(examples[-1].tokens)
    wanted = len(examples) + training.episodes_per_update // (2 if state.own else 1)
    longest = training.short_steps if state.update < training.short_until else benchmark.step_limit
    tries = count(1)
    while len(examples) < wanted:
        if next(tries) > _TRIES * wanted:
            raise UserError(
                f"the agent's short_steps: next to none of {_TRIES * wanted:,} expert episodes took {longest} steps"
                f" or fewer{f' and the {room:,} tokens that the model has positions for' if room else ''}; give more steps, or"
                " set short_until to 0"
            )
        example = expert_example(rng.choice(tasks), prompter, benchmark.step_limit, training.mistake_rate, rng)
        if example.steps <= longest and (room is None or len(example.tokens) <= room):
            examples.append(example)
    return examples


def _save(path: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], state: _State) -> None:
    content = {
        "model": trained_weights(model),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "update": state.update,
        "own": [vars(example) for example in state.own],
        "log": state.log,
    }
    save_state(path, content)


def _note(log: Sequence[dict[str, float]], speed: float) -> str:
    losses = [row["loss"] for row in log[-50:] if "loss" in row]
    success = [row["success"] for row in log if "success" in row]
    won = f", success {success[-1]:.2f}" if success else ""
    return f"loss {sum(losses) / len(losses):.3f}{won}, {speed:,.0f} tokens/s"
