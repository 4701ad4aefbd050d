"""Small random causal models of two kinds, and their logits without a cache."""

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCABULARY = 50
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
}
CONFIGS: list[PreTrainedConfig] = [
    Qwen3Config(**SHAPE, tie_word_embeddings=True),
    Qwen3Config(**SHAPE, tie_word_embeddings=False),
    LlamaConfig(**SHAPE),
]


def causal_lm(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = [causal_lm(config) for config in CONFIGS]


@torch.no_grad()
def uncached(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
