"""How large the agent's model and its rungs are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from optimum.quanto import QLinear, QTensor
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dmr_pipeline.agent.checkpoint import load_tokenizer, local_folder, unusable_files
from dmr_pipeline.agent.formats import refuse_architecture
from dmr_pipeline.agent.logits import MODEL_ERRORS
from dmr_pipeline.precision import pass_bytes
from dmr_pipeline.precision.quantization import quantize_rung
from dmr_pipeline.pretrained import adapter_config, base_revision
from dmr_pipeline.recipe.agent import Training
from dmr_pipeline.recipe.model import Pretrained
from dmr_pipeline.recipe.precisions import Rung
from dmr_pipeline.training.train import new_model


@dataclass(frozen=True)
class RungShape:
    """Bytes of one rung."""

    file: int
    """Of the weights as they are stored."""
    acting: int
    """Of the weights that compute when it acts."""
    common: int
    """Of `acting`, what other rungs have too, bit by bit: what is not quantized."""


def config_folder(source: Pretrained) -> tuple[Path, str | None]:
    """The folder with the config and the tokenizer of an LLM that is brought along, without its weights where it comes from the
    hub; of an adapter, that of its base, and of its base's revision.

    Raises:
        UserError: as `local_folder`.
    """
    folder = local_folder(source.model, source.revision, weights=False)
    adapter = adapter_config(folder)
    if adapter is None or adapter.base_model_name_or_path is None:
        return folder, source.revision
    revision = base_revision(source.model, source.revision, adapter)
    return local_folder(adapter.base_model_name_or_path, revision, weights=False), revision


def brought_config(source: Pretrained) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Of an LLM that is brought along.

    Raises:
        UserError: as `config_folder`; it is no causal LM, or the config or the tokenizer cannot be used.
    """
    folder, _ = config_folder(source)
    with unusable_files(f"model {source.model!r}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_architecture(source.model, config)
    return config, load_tokenizer(folder)


def trained_config(training: Training, vocabulary: int, positions: int | None) -> PreTrainedConfig:
    """Of an agent that is trained here."""
    with init_empty_weights():
        config: PreTrainedConfig = new_model(training.architecture, vocabulary, training.seed, positions).config
    return config


def without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of shapes alone."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def rung_shape(model: PreTrainedModel, rung: Rung, dequantized: bool, kernels: bool = False) -> RungShape:
    """
    Args:
        model: without weights.
        rung: of the ladder; one that is imported is taken to be as large as one that is quantized here.
        dequantized: whether its layers are plain float when it acts, as on a CPU.
        kernels: whether low-bit kernels compute: these have the plain weights beside the packed ones.
    """
    simplest: dict[str, Any] = {"ranges": None, "rounding": None, "activations": "none", "checkpoint": None}
    made = quantize_rung(model, rung.model_copy(update=simplest))  # equally large, and nothing is looked for
    plain = [p.nbytes for p in made.parameters() if not isinstance(p, QTensor)]
    packed = [_inner_bytes(m) for m in made.modules() if isinstance(m, QLinear) and isinstance(m.weight, QTensor)]
    floats = [m.weight.nbytes for m in made.modules() if isinstance(m, QLinear) and isinstance(m.weight, QTensor)]
    computing = (floats if dequantized or kernels else []) + (packed if kernels or not dequantized else [])
    return RungShape(
        file=sum(plain) + sum(packed),
        acting=sum(plain) + sum(computing),
        common=sum(plain),
    )


def _inner_bytes(layer: nn.Module) -> int:
    """Of the integers, scales and shifts of a quantized layer."""
    inner: dict[str, torch.Tensor] = {}
    layer.weight.save_to_state_dict(inner, "", False)  # type: ignore[operator, union-attr] # quanto's own
    return sum(tensor.nbytes for tensor in inner.values())


def weights_held(rungs: Sequence[RungShape]) -> int:
    """Bytes of the weights of rungs that act side by side."""
    return max((rung.common for rung in rungs), default=0) + sum(rung.acting - rung.common for rung in rungs)


def cached_numbers(config: PreTrainedConfig) -> int:
    """Numbers of keys and values, in all layers, for a token: measured without weights; of a model that does not run so, as if
    all its layers had the heads that the config tells."""
    try:
        return int(pass_bytes.cached_numbers(without_weights(config, torch.bfloat16)))
    except MODEL_ERRORS:
        text = config.get_text_config(decoder=True)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return 2 * int(text.num_hidden_layers * heads * width)
