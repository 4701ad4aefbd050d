"""Shapes without weights, beside models that have some."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from dmr_pipeline.plan.shapes import cached_numbers, rung_shape, trained_config, weights_held, without_weights
from dmr_pipeline.precision import pass_bytes
from dmr_pipeline.precision.acting import ActingModels
from dmr_pipeline.precision.quantization import quantize_rung, save_rung
from dmr_pipeline.recipe.agent import Training
from dmr_pipeline.recipe.model import Architecture
from dmr_pipeline.recipe.precisions import Rung
from tests.helpers.kinds import KINDS, model_of

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS: list[PreTrainedConfig] = [
    LlamaConfig(**SIZES, tie_word_embeddings=True),
    Qwen3Config(**SIZES, tie_word_embeddings=False),
]
LADDER = [
    Rung(name="float", weights="float"),
    Rung(name="int8", weights="int8", head="int8"),
    Rung(name="int4", weights="int4", ranges="mse", head="int8"),
    Rung(name="int3", weights="int3", keep_float=("*.down_proj", "lm_head")),
    Rung(name="int2", weights="int2", keep_float=()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=["tied", "untied"])
def test_rungs_are_as_large_as_those_with_weights(tmp_path: Path, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    shapes = {rung.name: rung_shape(without_weights(config, dtype), rung, dequantized=True) for rung in LADDER}
    for rung in LADDER:
        save_rung(quantize_rung(model, rung), tmp_path / rung.name)
        with safe_open(tmp_path / rung.name / "model.safetensors", "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys() if "put_scale" not in name}  # noqa: SIM118
        assert shapes[rung.name].file == sum(tensor.nbytes for tensor in stored.values())
    for names in (["float", "int2"], ["int3", "int2"], ["float", "int3"]):
        acting = ActingModels.load(tmp_path, names, CPU)
        held = {p.data_ptr(): p.nbytes for one in acting.models.values() for p in one.parameters()}
        planned = weights_held([shapes[name] for name in names])
        assert planned == pytest.approx(sum(held.values()), rel=0.12), names


def test_a_model_without_weights_takes_no_memory() -> None:
    huge = LlamaConfig(vocab_size=128_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32)
    model = without_weights(huge, torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert rung_shape(model, LADDER[2], dequantized=False).file > 3e9


@pytest.mark.parametrize("config", [*CONFIGS, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)])
def test_cached_numbers(config: PreTrainedConfig) -> None:
    assert cached_numbers(config) == pass_bytes.cached_numbers(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("kind", ["falcon", "gemma4", "qwen3.5", "mamba", "gpt-neo", "gpt-oss", "falcon-h1"])
def test_cached_numbers_of_layers_that_differ_or_keep_other_states(kind: str) -> None:
    assert cached_numbers(KINDS[kind]()) == pass_bytes.cached_numbers(model_of(kind))


def test_an_agent_that_is_trained_here() -> None:
    architecture = Architecture(layers=2, width=32, heads=2, key_value_heads=1, head_width=16, feed_forward=48)
    training = Training.model_validate(
        {
            "architecture": architecture.model_dump(),
            **dict.fromkeys(["updates", "episodes_per_update", "dagger_every", "dagger_episodes", "dagger_steps"], 1),
            **{"learning_rate": 0.1, "warmup_updates": 0, "dagger_from": 1, "dagger_tokens": 1, "mistake_rate": 0.0},
        }
    )
    config = trained_config(training, 70, 300)
    assert (config.vocab_size, config.num_hidden_layers, config.max_position_embeddings) == (70, 2, 300)
