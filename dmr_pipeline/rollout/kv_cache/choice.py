"""How a model's transcripts are cached, how long they may be, and how many fit into memory.

What a model's layers and masks allow is found by trying it once on a few tokens, against plain forward passes: `PackedStreams`
(the Llama family), else `Streams` (batched), else `PlainStreams` by the model's own cache, else the model is refused.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dmr_pipeline.agent.logits import MODEL_ERRORS, TEXTS, alike, some_tokens
from dmr_pipeline.agent.memory import free_memory
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.pass_bytes import cached_numbers
from dmr_pipeline.recipe.agent import DEFAULT_TRANSCRIPT_TOKENS
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import Streams, TokenStreams, attention_windows
from dmr_pipeline.rollout.kv_cache.plain import PlainStreams
from dmr_pipeline.rollout.kv_cache.shared import SharedStreams

log = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.8
"""Of the free memory, what caches may take; the rest is for what a forward pass needs besides."""


class _Way(NamedTuple):
    make: Callable[[PreTrainedModel, int, int], TokenStreams]
    name: str
    slow: bool
    """One episode a pass, and each kept twice."""


_WAYS = (
    _Way(PackedStreams, "packed", slow=False),
    _Way(Streams, "batched", slow=False),
    _Way(PlainStreams, "plain: by the model's own cache, one episode a pass, exact and slower", slow=True),
    _Way(
        partial(PlainStreams, chunks=False),
        "plain, token by token: by the model's own cache, one token a pass, exact and much slower",
        slow=True,
    ),
)
_found: WeakKeyDictionary[PreTrainedModel, _Way] = WeakKeyDictionary()


def token_streams(model: PreTrainedModel, slots: int, capacity: int) -> TokenStreams:
    """The fastest exact streams for this model. It is put into evaluation mode.

    Args:
        slots: number of sequences.
        capacity: tokens that one sequence may have.

    Raises:
        UserError: the model has fewer positions, or no way of caching gives what its plain forward passes give.
    """
    refuse_positions(model.config, capacity, "agent.max_transcript_tokens")
    return way_of(model).make(model, slots, capacity)


def shared_streams(models: Mapping[str, PreTrainedModel], slots: int, capacity: int) -> SharedStreams:
    """The fastest exact streams of one cache for all these models, which are of one shape.

    Args:
        models: rung -> its model, dearest first.

    Raises:
        UserError: as `token_streams`; or a model's cache cannot be cut.
    """
    for model in models.values():
        refuse_positions(model.config, capacity, "agent.max_transcript_tokens")
    slowest = max((way_of(model) for model in models.values()), key=_WAYS.index)
    if slowest.slow:
        model_type = next(iter(models.values())).config.model_type
        raise UserError(
            f"precisions.cache: shared needs a cache that can be cut, and that of model type {model_type!r} cannot be"
            f" ({slowest.name}); set it to separate"
        )
    return SharedStreams(PackedStreams if slowest.make is PackedStreams else Streams, models, slots, capacity)


def way_of(model: PreTrainedModel) -> _Way:
    """Found by trying, once for each model.

    Raises:
        UserError: no way of caching gives what plain forward passes give.
    """
    if model not in _found:
        way = next((way for way in _WAYS if _is_exact(way, model)), None)
        if way is None:
            raise UserError(
                f"model type {model.config.model_type!r} cannot act: with a cache it gives other logits than without one;"
                " choose another model"
            )
        if way.slow:
            log.warning("model type %r acts on the slow path (%s)", model.config.model_type, way.name)
        _found[model] = way
    return _found[model]


def _is_exact(way: _Way, model: PreTrainedModel) -> bool:
    """Whether these streams give what forward passes over the whole text give, on one of `TEXTS` at least."""
    return any(_is_exact_on(some_tokens(model, 12, text)[0].tolist(), way, model) for text in range(TEXTS))


@torch.no_grad()
def _is_exact_on(tokens: list[int], way: _Way, model: PreTrainedModel) -> bool:
    """By streams of different lengths, cut and continued."""
    try:
        if not way.slow and attention_windows(model.config) is None:
            return False
        streams = way.make(model, 2, 12)
        streams.extend([0, 1], [tokens[:5], tokens[:3]])
        streams.extend([1], [tokens[9:10]])
        streams.truncate(1, 3)
        found = [
            *streams.extend([0, 1], [tokens[5:7], tokens[3:10]]),
            *streams.extend([1, 0], [tokens[10:], tokens[7:8]]),
        ]
        wanted = [
            model(input_ids=torch.tensor([tokens[:n]], device=model.device)).logits[0, -1] for n in (7, 10, 12, 8)
        ]
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS:
        return False
    # Rounded activations may fall on the other side of a step.
    return all(alike(row, expected.float(), model.dtype, slack=10) for row, expected in zip(found, wanted, strict=True))


def rows_that_fit(
    models: Sequence[PreTrainedModel],
    capacity: int,
    rows: int,
    processes: int,
    shared: bool = False,
    asked: str = "runtime.batch_episodes",
) -> int:
    """How many of `rows` transcripts may grow to `capacity` tokens, each in the caches of all these models, in the memory that
    is free; at least 1. A smaller number changes how long it takes, not what comes out, and is logged.

    Args:
        processes: that share a CPU's memory.
        shared: the models have one cache.
        asked: where `rows` comes from.
    """
    needed = capacity * sum(_cache_bytes(model) for model in (models[:1] if shared else models))
    fitting = int(_SHARE_OF_MEMORY * free_memory(models[0].device) / (processes * max(needed, 1)))
    if fitting >= rows:
        return rows
    fitting = max(fitting, 1)
    log.warning(
        "%d episodes at once instead of %d (%s): %d tokens of one take %.2f GB of cache; agent.max_transcript_tokens, set lower,"
        " leaves room for more",
        fitting,
        rows,
        asked,
        capacity,
        needed / 1e9,
    )
    return fitting


def _cache_bytes(model: PreTrainedModel) -> float:
    """Of keys and values, a token. The plain path keeps them twice."""
    return (2 if way_of(model).slow else 1) * cached_numbers(model) * model.dtype.itemsize


def positions_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a model has positions for, None for any number.

    That is `max_position_embeddings`; with YaRN, what it was scaled to; and with dynamic NTK and LongRoPE, which rescale the
    positions of all tokens once a text is long, the length up to which they do not, since cached keys could not follow.
    """
    decoder = config.get_text_config(decoder=True)
    positions: int | None = getattr(decoder, "max_position_embeddings", getattr(decoder, "max_seq_len", None))
    ropes = getattr(decoder, "rope_parameters", None) or {}
    limits = [positions]
    for rope in [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]:
        original = rope.get("original_max_position_embeddings") or positions
        if rope.get("rope_type") in ("dynamic", "longrope"):
            limits.append(original)
        elif rope.get("rope_type") == "yarn" and positions is not None:
            limits[0] = max(positions, int(original * rope.get("factor", 1)))
    return min((limit for limit in limits if limit is not None), default=None)


def refuse_positions(config: PreTrainedConfig, tokens: int, field: str) -> None:
    """Raise a UserError where a model has no positions for so many tokens.

    Args:
        field: of the recipe, that is to be set lower.
    """
    positions = positions_of(config)
    if positions is not None and tokens > positions:
        raise UserError(
            f"model type {config.model_type!r} has positions for {positions} tokens that a cache can hold, {tokens} are asked"
            f" for: set {field} to {positions} or less"
        )


def transcript_capacity(config: PreTrainedConfig, wanted: int | None) -> int:
    """Tokens that a transcript may have.

    Args:
        wanted: the recipe's `agent.max_transcript_tokens`; by default what the model has positions for, up to
            DEFAULT_TRANSCRIPT_TOKENS.

    Raises:
        UserError: the model has fewer positions than wanted.
    """
    if wanted is None:
        return min(positions_of(config) or DEFAULT_TRANSCRIPT_TOKENS, DEFAULT_TRANSCRIPT_TOKENS)
    refuse_positions(config, wanted, "agent.max_transcript_tokens")
    return wanted
