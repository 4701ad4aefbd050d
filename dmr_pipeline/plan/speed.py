"""How fast a model of some shape reads, writes, learns, is compared and rounded here, with random weights."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from optimum.quanto import MaxOptimizer, qint4
from transformers import PreTrainedConfig, PreTrainedModel

from dmr_pipeline.agent.checkpoint import random_causal_lm
from dmr_pipeline.plan.episodes import Episodes
from dmr_pipeline.plan.shapes import without_weights
from dmr_pipeline.precision.gptq import round_by_gptq
from dmr_pipeline.rollout.kv_cache.choice import token_streams
from dmr_pipeline.router.labels import own_numbers, token_divergences
from dmr_pipeline.training.examples import IGNORED, Example
from dmr_pipeline.training.train import learn

ROWS = 8
"""Episodes at once, at most, that are tried."""
_REPEATS = 3
_COMPARED = 16
"""Tokens."""
_ROUNDED = 256
"""Columns."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one process."""

    read: float
    """In the segments of steps."""
    write: float
    """One after the other."""
    learn: float
    """Forward and backward."""
    measured: bool
    """False where it was said instead."""
    compare: float | None = None
    """Tokens at which the distributions of two precisions are compared; None counts it for nothing."""
    round: float | None = None
    """Columns of a decoder's linear layer that GPTQ rounds; None counts it for nothing."""


def measured_speed(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    episodes: Episodes,
    capacity: int,
    rows: int,
    learns_in: torch.dtype | None,
    threads: int,
    free: int,
) -> Speed:
    """Of a few forward passes in the middle of an episode, a backward pass, and a little of what else takes time.

    A model of more than a quarter of the free memory, or where it learns of an eighth, is tried with fewer layers, and taken to
    be slower by as much as it has more weights.

    Args:
        dtype: that it acts in.
        capacity: tokens that a transcript may have.
        rows: episodes at once.
        learns_in: of the matrix products of training; None where nothing is trained.
        threads: torch's when it learns.
        free: bytes of memory.
    """
    # Learning holds weights and gradients in float32, and a copy of the weights in bfloat16: five times what acts in that.
    few, share = _few_layers(config, dtype, free // (8 if learns_in is not None else 4))
    model = random_causal_lm(few, device).to(dtype)
    rows = min(rows, ROWS)
    segment = max(1, min(int(episodes.segment), (capacity - 17) // _REPEATS - 4))  # that all of them fit
    besides = _REPEATS * (segment + 4) + 16
    middle = max(1, min(int(episodes.tokens(episodes.steps / 2)), capacity - besides))
    streams = token_streams(model, rows, middle + besides)
    everyone = list(range(rows))
    streams.extend(everyone, [[1] * middle] * rows)
    reading, writing = [], []
    for _ in range(_REPEATS):
        reading.append(_seconds(device, lambda: streams.extend(everyone, [[1] * segment] * rows)))
        writing.append(_seconds(device, lambda: [streams.extend(everyone, [[1]] * rows) for _ in range(2)]) / 2)
    read = rows * segment / (min(reading) / share)
    write = rows / (min(writing) / share)
    vocabulary, width = model.get_output_embeddings().weight.shape
    acting_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    learn = _learning(model, episodes, capacity, device, learns_in, share)
    torch.set_num_threads(acting_threads)
    return Speed(read, write, learn, True, _comparing(vocabulary, device), _rounding(width, device))


def _comparing(vocabulary: int, device: torch.device) -> float:
    high, low = torch.randn(2, _COMPARED, vocabulary, device=device)
    return _COMPARED / min(_seconds(device, lambda: (token_divergences(high, low), own_numbers(low))) for _ in range(2))


def _rounding(width: int, device: torch.device) -> float:
    """Of a square layer, at most so many columns."""
    columns = min(width, _ROUNDED)
    weight = torch.randn(width, columns, device=device)
    return columns / _seconds(
        device,
        lambda: round_by_gptq(
            weight, torch.eye(columns, dtype=torch.float64, device=device), qint4, MaxOptimizer(), 0.01
        ),
    )


def _few_layers(config: PreTrainedConfig, dtype: torch.dtype, most: int) -> tuple[PreTrainedConfig, float]:
    """The config with few enough layers for so many bytes, one at least, and the share of the weights that a token then goes
    through."""
    few = copy.deepcopy(config)
    text = few.get_text_config()
    whole = weights_gone_through(config, dtype)
    while weights_gone_through(few, dtype) > most and text.num_hidden_layers > 1:
        text.num_hidden_layers = (text.num_hidden_layers + 1) // 2
        if len(getattr(text, "layer_types", None) or ()) > text.num_hidden_layers:  # some configs make it of the number
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    return few, weights_gone_through(few, dtype) / whole


def weights_gone_through(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights but the embeddings, the head among them."""
    model = without_weights(config, dtype)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    held = sum(parameter.nbytes for parameter in model.parameters())
    return held if head is embedding else held - embedding.nbytes


def _learning(
    model: PreTrainedModel,
    episodes: Episodes,
    capacity: int,
    device: torch.device,
    compute: torch.dtype | None,
    share: float,
) -> float:
    if compute is None:
        return 0.0
    length = min(int(episodes.tokens(episodes.steps)), capacity)
    targets = [1 if i % length < episodes.steps * episodes.action else IGNORED for i in range(length)]
    examples = [Example([1] * length, targets, int(episodes.steps))]
    model = model.float().train()
    return length / (_seconds(device, lambda: learn(model, examples, device, compute)) / share)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
