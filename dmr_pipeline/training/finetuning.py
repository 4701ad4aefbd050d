"""Fine-tuning an LLM that exists: what of it is trained, by whom, and how the outcome is stored."""

import copy
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel

from dmr_pipeline.errors import UserError
from dmr_pipeline.pretrained import ADAPTER_CONFIG
from dmr_pipeline.recipe.agent import Finetune
from dmr_pipeline.recipe.model import Lora, Pretrained
from dmr_pipeline.training.train import trained_weights

COMPUTE = torch.bfloat16
"""Of the matrix products. Weights that are trained are held in float32, those that are not in this."""
ADAPTER_STORED = torch.float16
"""An adapter's numbers are small: float16 has three bits more for them than bfloat16."""


def add_adapter(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Adapters in float32 at the layers that the recipe names, in place; all other weights are frozen, in bfloat16.

    `get_base_model` of what comes back is the model, which learns as before, under autocast.

    Raises:
        UserError: a target is no linear layer of the model, or one whose weights another layer has too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    torch.manual_seed(seed)  # A is drawn, B is 0
    config = LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules)
    try:
        adapted = get_peft_model(model.to(COMPUTE), config)
    except ValueError as error:
        raise UserError(f"agent.finetune.lora.targets: {' '.join(str(error).split())[:300]}") from error
    for layer in _adapted_layers(adapted):
        if embedding.weight is head.weight and layer.get_base_layer() in (embedding, head):
            raise UserError(
                "agent.finetune.lora.targets: the model's head is its embedding, and an adapter of one would be merged into both:"
                f" name neither (they are {list(lora.targets)})"
            )
        layer.cast_input_dtype_enabled = False  # autocast does it, without a copy in float32
    return adapted


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with its adapters merged, which acts in fewer operations; a model without adapters itself."""
    if not _adapted_layers(model):
        return model
    merged = copy.deepcopy(model)
    for layer in _adapted_layers(merged):
        layer.merge()
    return merged


def _adapted_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adam(model: PreTrainedModel, finetune: Finetune) -> torch.optim.Optimizer:
    """AdamW for all that is trained."""
    weights = list(trained_weights(model).values())
    return torch.optim.AdamW(weights, lr=finetune.learning_rate, weight_decay=finetune.weight_decay, betas=(0.9, 0.98))


def save_adapter(adapted: PeftModel, base: Pretrained, folder: Path) -> None:
    """Write adapter_config.json, which names the base as the recipe does, and adapter_model.safetensors, in peft's format.
    Equal adapters give equal bytes."""
    for parameter in trained_weights(adapted.get_base_model()).values():
        parameter.data = parameter.data.to(ADAPTER_STORED)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.model, base.revision
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    adapted.save_pretrained(folder, save_embedding_layers=False)  # else it asks the hub for the base's config
    for path in folder.iterdir():
        if path.name not in (ADAPTER_CONFIG, SAFETENSORS_WEIGHTS_NAME):  # a card to fill in
            path.unlink()
    # Without the library's version the files' hashes stay when only the library changes.
    written = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    written.pop("peft_version", None)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
