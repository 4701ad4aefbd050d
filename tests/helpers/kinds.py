"""A small random model of each kind that people bring; their weights are large enough for every part to matter."""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

VOCABULARY = 61
WINDOW = 8
"""Tokens that a token of a sliding-window layer sees, itself among them."""
POSITIONS = 96
"""That the models with learned or rescaled positions have."""

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
}
_OLD_SHAPE = {**_SHAPE, "num_hidden_layers": 2}
for _name in ("num_key_value_heads", "head_dim", "intermediate_size"):
    del _OLD_SHAPE[_name]
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
_ONE_FULL = {"layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

KINDS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "granite": lambda: GraniteConfig(**_SHAPE, logits_scaling=8.0),
    "cohere": lambda: CohereConfig(**_SHAPE),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, initializer_range=0.3
    ),
    "gpt-neo": lambda: GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=2 * WINDOW,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**_OLD_SHAPE, intermediate_size=48),
    "opt": lambda: OPTConfig(
        **{**_OLD_SHAPE, "initializer_range": None}, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3
    ),
    "falcon": lambda: FalconConfig(**_OLD_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=WINDOW),
    "phi3": lambda: Phi3Config(**_SHAPE, sliding_window=WINDOW, pad_token_id=0),
    "gemma2": lambda: Gemma2Config(**_SHAPE, sliding_window=WINDOW, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE,
        **_ONE_FULL,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        final_logit_softcapping=5.0,
    ),
    "gemma4": lambda: Gemma4TextConfig(
        **_SHAPE,
        **_ONE_FULL,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
    ),
    "olmo3": lambda: Olmo3Config(**_SHAPE, sliding_window=WINDOW),
    "cohere2": lambda: Cohere2Config(**_SHAPE, sliding_window=WINDOW),
    "gpt-oss": lambda: GptOssConfig(**_SHAPE, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "falcon-alibi": lambda: FalconConfig(**_OLD_SHAPE, alibi=True),
    "qwen3-next": lambda: Qwen3NextConfig(
        **_SHAPE, **_LINEAR, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=16
    ),
    "qwen3.5": lambda: Qwen3_5TextConfig(**_SHAPE, **_LINEAR),
    "falcon-h1": lambda: FalconH1Config(
        **_SHAPE, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
    "recurrent-gemma": lambda: RecurrentGemmaConfig(
        **{**_SHAPE, "num_hidden_layers": 3}, lru_width=32, attention_window_size=WINDOW
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3
    ),
    "bert-decoder": lambda: BertConfig(**_OLD_SHAPE, intermediate_size=48, is_decoder=True),
    "bert": lambda: BertConfig(**_OLD_SHAPE, intermediate_size=48),
    "dynamic-ntk": lambda: LlamaConfig(
        **_SHAPE,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    ),
    "yarn": lambda: LlamaConfig(
        **_SHAPE,
        max_position_embeddings=POSITIONS,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": POSITIONS // 4,
        },
    ),
}


def model_of(kind: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(KINDS[kind]()).eval()
