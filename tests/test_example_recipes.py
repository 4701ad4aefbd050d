"""The recipes for users' GPUs: nobody has run them here, so that what can be tried without their weights is tried."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from dmr_pipeline.plan.shapes import cached_numbers, rung_shape, weights_held, without_weights
from dmr_pipeline.precision.quantization import load_rung, quantize_rung, save_rung
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.kv_cache.choice import transcript_capacity, way_of

FOLDER = Path(__file__).parents[1] / "examples/recipes"
QWEN = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40_960}
CONFIGS: dict[str, PreTrainedConfig] = {
    "Qwen/Qwen3-1.7B": Qwen3Config(
        **QWEN, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-4B": Qwen3Config(
        **QWEN, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    ),
}  # fmt: skip
"""As these models' cards have them."""
WEIGHTS = {
    "Qwen/Qwen3-1.7B": 1.72e9,
    "Qwen/Qwen3-4B": 4.02e9,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03e9,
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> Recipe:
    return Recipe.model_validate({"name": name, **yaml.safe_load((FOLDER / f"{name}.yaml").read_text())})


def config_of(recipe: Recipe) -> PreTrainedConfig:
    assert recipe.agent.pretrained is not None
    return CONFIGS[recipe.agent.pretrained.model]


def test_the_four_are_there() -> None:
    assert NAMES == ["alfworld-llama-3.1-8b", "alfworld-qwen3-1.7b", "alfworld-qwen3-4b", "webshop-qwen3-1.7b"]


@pytest.mark.parametrize("name", NAMES)
def test_it_says_that_it_was_never_run_and_what_to_do(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# Never run: ")
    assert "as `revision`" in text
    assert f"`dmr plan {name}`" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_models_shape_goes_with_the_recipe(name: str) -> None:
    recipe = read(name)
    config = config_of(recipe)
    assert transcript_capacity(config, recipe.agent.max_transcript_tokens) == recipe.agent.max_transcript_tokens
    probe = recipe.kl_router.model.probe
    assert probe is not None
    assert max(probe.layers) <= config.num_hidden_layers
    model = without_weights(config, torch.bfloat16)
    assert recipe.agent.pretrained is not None
    assert model.num_parameters() == pytest.approx(WEIGHTS[recipe.agent.pretrained.model], rel=0.02)
    largest = weights_held([rung_shape(model, recipe.precisions.ladder[i], dequantized=False) for i in (0, 2)])
    row = cached_numbers(config) * 2 * 4096
    assert largest + 2 * 16 * row < 75e9, "two precisions and sixteen episodes fit into 80 GB"


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("alfworld")])
def test_a_model_of_that_kind_with_few_layers_goes_through_its_ladder(tmp_path: Path, name: str) -> None:
    recipe = read(name)
    content = config_of(recipe).to_dict()
    content |= {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    content |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "layer_types": None}
    config = type(config_of(recipe)).from_dict(content)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert way_of(model).name == "packed", "the fast engine"
    tokens = torch.arange(20)[None]
    for rung in recipe.precisions.ladder:
        made = quantize_rung(model, rung.model_copy(update={"rounding": None}))
        save_rung(made, tmp_path / rung.name)
        loaded = load_rung(tmp_path / rung.name, torch.device("cpu"))
        assert torch.equal(loaded(tokens).logits, made(tokens).logits)
