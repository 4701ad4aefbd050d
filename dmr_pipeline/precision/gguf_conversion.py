"""A GGUF file as a checkpoint folder of safetensors: weights, config, tokenizer and chat template."""

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from dmr_pipeline.agent.checkpoint import save_causal_lm, unusable_files
from dmr_pipeline.agent.formats import refuse_architecture
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.gguf_file import gguf_config, load_gguf, open_gguf, refuse_left_over

_NORMS_EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
"""What configs call the number that their norms divide by at least."""
_SCALING = re.compile(r"\.rope\.(scaling\.type|scale_linear)$")
_CPU = torch.device("cpu")
_BYTE_LEVEL = "gpt2"
_PLAIN = (None, "default", "gpt-2")
_DIGITS = "smollm"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def convert_gguf(path: Path, folder: Path, name: str) -> None:
    """Write the file's model as a checkpoint folder. Equal files give equal bytes.

    The weights are dequantized in float32 and stored in bfloat16, which LLMs are published in and act in on a GPU, and which
    keeps their norms exactly; what it rounds of the others, one part in 500, is far below a step of 4 bits.

    Args:
        name: what an error calls the model.

    Raises:
        UserError: the file is cut, no causal LM, lacks tensors or a tokenizer, has tensors that its architecture has not, scales
            its rotary positions, or its tokenizer splits text in a way that is not known here.
    """
    try:
        reader = open_gguf(path)
        with unusable_files("it"):
            _refuse_scaled_positions(reader)
            tokenizer = _tokenizer(path, reader)
            config = gguf_config(path)
            refuse_architecture(name, config)
            config.dtype = torch.float32
            # The file has single precision, in which 1e-05 is 9.999999747378752e-06.
            for epsilon in set(_NORMS_EPSILON) & set(config.to_dict()):
                setattr(config, epsilon, float(str(np.float32(getattr(config, epsilon)))))
            model = load_gguf(path, config, _CPU)
            refuse_left_over(reader, model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    ends = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.config.update(ends)
    model.config.__dict__.pop("_model_name_or_path", None)  # the file's own title
    model.generation_config = GenerationConfig(**ends)
    tokenizer.model_max_length = config.max_position_embeddings
    save_causal_lm(model, tokenizer, folder, torch.bfloat16)


def _refuse_scaled_positions(reader: GGUFReader) -> None:
    """Transformers reads nothing of how rotary positions are scaled, and so makes another model (Llama 3.1, linear, YaRN).

    Raises:
        UserError: they are.
    """
    said = {name: field.contents() for name, field in reader.fields.items() if _SCALING.search(name)}
    scaling = [f"{name} {value}" for name, value in said.items() if value not in ("none", 1.0)]
    scaling += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if scaling:
        raise UserError(
            f"it scales its rotary positions ({scaling[0]}), which is not read from GGUF files here: take the model's original"
            " checkpoint, a folder or a hub id"
        )


def _tokenizer(path: Path, reader: GGUFReader) -> PreTrainedTokenizerBase:
    """The file's tokenizer with the splitting of text that the file names.

    Raises:
        UserError: there is none, or one that is not known here.
    """
    kind, split = (
        None if field is None else str(field.contents())
        for field in (reader.get_field("tokenizer.ggml.model"), reader.get_field("tokenizer.ggml.pre"))
    )
    if kind is None:
        raise UserError("it has no tokenizer")
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    backend = read.backend_tokenizer
    if kind == _BYTE_LEVEL and split == _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif kind == _BYTE_LEVEL and split not in (*_PLAIN, *GGUF_PRE_TOKENIZER_SPLITS):
        raise UserError(
            f"its tokenizer splits text in a way that is not known here, {split!r}: convert it from its original checkpoint"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        **{special: getattr(read, special) for special in _SPECIAL},
    )
