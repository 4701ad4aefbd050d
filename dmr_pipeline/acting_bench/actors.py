"""Models that act, each in several precisions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from optimum.quanto import QLinear
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from dmr_pipeline.agent.checkpoint import load_causal_lm, random_causal_lm
from dmr_pipeline.artifacts.folders import DATA_ROOT
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.acting import acting_model
from dmr_pipeline.precision.kernels import LowBitLinear
from dmr_pipeline.precision.pass_bytes import PassBytes, cached_numbers
from dmr_pipeline.precision.quantization import quantize_rung
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.precisions import Rung
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.training.vocabulary import word_tokenizer

FLOAT32, BFLOAT16 = "float32", "bfloat16"
CHEAP, CHEAP_INT8 = "int4h kernels", "int8h kernels"
"""h: with a head of int8."""


@dataclass(frozen=True)
class Form:
    """A precision, and how it computes."""

    name: str
    rung: Rung
    kernels: Literal["low_bit"] | None = None
    dtype: torch.dtype = torch.bfloat16


def forms(device: torch.device) -> list[Form]:
    """By name: `plain` is dequantized, `quanto` as quanto's tensors compute on a GPU."""
    held = "plain" if device.type == "cpu" else "quanto"
    found = [Form(BFLOAT16, Rung(name="float", weights="float"))]
    if device.type == "cpu":
        found.insert(0, Form(FLOAT32, Rung(name="float", weights="float"), dtype=torch.float32))
    low_bits: tuple[Literal["int8", "int4", "int3", "int2"], ...] = ("int8", "int4", "int3", "int2")
    for weights in low_bits:
        rung = Rung(name=weights, weights=weights)
        found += [Form(f"{weights} {held}", rung), Form(f"{weights} kernels", rung, "low_bit")]
    found.append(Form(CHEAP_INT8, Rung(name="int8-head8", weights="int8", head="int8"), "low_bit"))
    return [*found, Form(CHEAP, Rung(name="int4-head8", weights="int4", head="int8"), "low_bit")]


@dataclass(frozen=True)
class Actor:
    """A float model in float32 on the CPU, and how it is spoken to."""

    name: str
    model: PreTrainedModel
    prompter: Prompter

    def acting(self, form: Form, device: torch.device) -> PreTrainedModel:
        """A model of its own."""
        model = quantize_rung(_copied(self.model, form.dtype, device), form.rung)
        return acting_model(model, device, form.kernels)


def _copied(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """With the same weights, rounded; its rotary frequencies, which are no weights, stay as precise."""
    with torch.random.fork_rng(), device:
        copied: PreTrainedModel = type(model)._from_config(model.config, dtype=dtype)
    copied.load_state_dict(model.state_dict())
    copied.generation_config = model.generation_config
    return copied.eval()


TINY, RANDOM = "tiny", "random-135m"
_COMMAND = "{observation}\nNext command:\n"


def load_actor(name: str, layers: int | None = None) -> Actor:
    """
    Args:
        name: `tiny`, the committed agent of alfworld-tiny; `random-135m`, a Llama of random weights in the shape of
            SmolLM2-135M; else a folder with a causal LM and its tokenizer.
        layers: of the random one; all 30 by default.

    Raises:
        UserError: the folder is not there, or holds no such model.
    """
    cpu = torch.device("cpu")
    if name == RANDOM:
        return _random_llama(layers or 30)
    folder = DATA_ROOT / "alfworld-tiny" / "agent" / "model" if name == TINY else Path(name)
    if not folder.is_dir():
        raise UserError(f"--model {name}: no folder {folder}; give {TINY}, {RANDOM} or the folder of a causal LM")
    model, tokenizer = load_causal_lm(folder, None, cpu)
    prompt = (
        Prompt() if name == TINY else Prompt(opening=_COMMAND, turn=_COMMAND, action_end="\n", max_action_tokens=24)
    )
    return Actor(name if name == TINY else folder.name, model, Prompter.of(tokenizer, prompt, model.generation_config))


def _random_llama(layers: int) -> Actor:
    """Its words are those of ALFWorld, and others that nobody says."""
    vocabulary, texts = 49_152, alfworld_texts()
    others = vocabulary - len(word_tokenizer(texts))
    tokenizer = word_tokenizer([*texts, " ".join(f"word{i}" for i in range(others))])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=16_384,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = random_causal_lm(config, torch.device("cpu"))
    return Actor(RANDOM, model, Prompter.of(tokenizer, Prompt(), model.generation_config))


def read_bytes(model: PreTrainedModel) -> PassBytes:
    """What a pass over few tokens reads, as the weights lie in memory."""
    weights = 0
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            weights += module.pass_bytes
        elif not isinstance(module, nn.Embedding):
            weights += sum(tensor.nbytes for tensor in _stored(module))
    row = model.get_input_embeddings().weight
    return PassBytes(weights, row.shape[1] * row.element_size(), cached_numbers(model))


def held_bytes(model: PreTrainedModel) -> int:
    """Of all weights in memory, in each form in which they are there."""
    sizes = {tensor.data_ptr(): tensor.nbytes for module in model.modules() for tensor in _stored(module)}
    low_bits = [module.pass_bytes for module in model.modules() if isinstance(module, LowBitLinear)]
    return sum(sizes.values()) + sum(low_bits)


def _stored(module: nn.Module) -> list[Tensor]:
    """A module's own parameters; of quanto's layers the tensors that they are made of."""
    if not isinstance(module, QLinear):
        return list(module.parameters(recurse=False))
    return [tensor for name, tensor in module.state_dict().items() if name.startswith(("weight", "bias"))]
