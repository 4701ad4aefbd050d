"""Decoding at batch 1 with random weights of a real model's shape, against the time that reading its weights takes."""

import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import PreTrainedModel, Qwen3Config

from dmr_pipeline.agent.checkpoint import random_causal_lm
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.gpu_check.kernels import bandwidth
from dmr_pipeline.gpu_check.record import Part
from dmr_pipeline.gpu_check.sizes import Shape, Sizes
from dmr_pipeline.precision.quantization import quantize_rung, rung_size
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.precisions import Rung
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.engine import ALONE, play
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.training.vocabulary import word_tokenizer

RUNGS = (
    Rung(name="float", weights="float"),
    Rung(name="int8", weights="int8"),
    Rung(name="int4", weights="int4"),
    Rung(name="int2", weights="int2"),
)
_SECONDS_A_RUNG = 20.0
"""Left, for another rung to be measured."""


def random_model(shape: Shape, device: torch.device) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_width,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return random_causal_lm(config, device)


def decoding(sizes: Sizes, device: torch.device, part: Part, left: Callable[[], float]) -> None:
    """Milliseconds a token: one forward pass after another through `Streams`, whole actions through the rollout, and
    transformers' `generate`.

    Args:
        left: seconds that the check has left.
    """
    part.units = {"weights": "B", "limit": "ms", "streams": "ms", "rollout": "ms", "generate": "ms", "made_in": "s"}
    copied = bandwidth(device, sizes.copied_bytes)
    for shape in sizes.shapes:
        model = random_model(shape, device)
        for rung in RUNGS:
            label = f"{shape.name}, {rung.name}"
            if left() < _SECONDS_A_RUNG:
                part.leave_out(f"{label}: {left():.0f} s are left")
                continue
            started = time.perf_counter()
            quantized = quantize_rung(model, rung)
            made_in = time.perf_counter() - started
            weights = rung_size(quantized).bytes
            limit = 1000 * weights / copied
            streams = _streams_ms(quantized, sizes, device)
            part.row(
                model=label,
                weights=weights,
                limit=limit,
                streams=streams,
                rollout=_rollout_ms(quantized, shape, sizes),
                generate=_generate_ms(quantized, sizes, device),
                streams_over_limit=streams / limit,
                made_in=made_in,
            )
            del quantized


def _streams_ms(model: PreTrainedModel, sizes: Sizes, device: torch.device) -> float:
    streams = Streams(model, 1, sizes.prompt_tokens + sizes.new_tokens)
    logits = streams.extend([0], [_prompt(sizes)])
    times = []
    for _ in range(sizes.new_tokens):
        token = int(logits.argmax())
        started = time.perf_counter()
        logits = streams.extend([0], [[token]])
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1000 * median(times)


def _prompt(sizes: Sizes) -> list[int]:
    return [1 + i % 97 for i in range(sizes.prompt_tokens)]


def _rollout_ms(model: PreTrainedModel, shape: Shape, sizes: Sizes) -> float:
    """Of a token of one game's first two actions, prompts included."""
    texts = alfworld_texts()
    known = len(word_tokenizer(texts))
    filled = word_tokenizer([*texts, " ".join(f"word{i}" for i in range(shape.vocabulary - known))])
    prompter = Prompter.of(filled, Prompt(max_action_tokens=sizes.new_tokens))
    streams, clock = Streams(model, 1, 4096), Timings()
    run, policy = RolloutRequest(generate_game(0)[0]), SinglePrecision(ALONE)
    (played,) = play([run], {ALONE: streams}, prompter, policy, 2, clock=clock)
    return 1000 * clock.agent / sum(len(step.action) for step in played.steps)


def _generate_ms(model: PreTrainedModel, sizes: Sizes, device: torch.device) -> float:
    """Of a token between the first quarter of the new ones and the last."""
    prompt = torch.tensor([_prompt(sizes)], device=device)

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        assert made.shape[1] == sizes.prompt_tokens + tokens  # and the tokens are here: the device is done
        return time.perf_counter() - started

    few = sizes.new_tokens // 4
    seconds(few)
    return 1000 * (seconds(sizes.new_tokens) - seconds(few)) / (sizes.new_tokens - few)
