"""What a checkpoint's files are, found before any weight is read: each kind that cannot be used is refused by its name."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from dmr_pipeline.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PACKAGES = {"gptq": "gptqmodel", "awq": "gptqmodel or autoawq", "quanto": "optimum-quanto", "mxfp4": "kernels"}
"""By transformers' name of a quantization method; other packages are called as their method."""
_QUANTIZERS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""What quantizers write beside a config.json that does not mention them."""
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of classes with a language model's head; encoder-decoders, which share the last, are told apart before."""
_AS_A_RUNG = "gptq, awq and GGUF can be a rung of the same model: precisions.ladder[].checkpoint"


class StoredTensor(NamedTuple):
    name: str
    file: Path
    dtype: str
    """In safetensors' spelling, such as BF16 or I32."""
    shape: tuple[int, ...]


def refuse_file(path: Path) -> None:
    """Raise a UserError if the path is a file, since a checkpoint is a folder."""
    if path.suffix == ".gguf":
        raise UserError(
            f"model {str(path)!r}: GGUF files are not read as they are: dmr models fetch {path} converts it ({_AS_A_RUNG})"
        )
    if path.is_file():
        raise UserError(f"model {str(path)!r} is a file: name the folder that has config.json and the weights")


def refuse_pickles(folder: Path) -> None:
    """Raise a UserError if the folder has no safetensors weights; it says so where there are others instead."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"model folder {folder}: {pickles[0]} is a pickle, which can run code when it is read;"
            " convert the weights to safetensors (save_pretrained)"
        )
    for path in sorted(folder.glob("*.gguf")):
        refuse_file(path)
    raise UserError(f"model folder {folder}: there are no safetensors weights (*.safetensors) in it")


def refuse_quantized(name: str, folder: Path) -> None:
    """Raise a UserError if the files beside the weights say that these are quantized."""
    found = quantization(folder)
    if found is not None:
        method, _ = found
        raise _quantized(name, f"{method}, of the package {_PACKAGES.get(method, method)}")


def refuse_low_bits(name: str, folder: Path) -> None:
    """Raise a UserError if matrices are stored as integers or in 8 bits, whatever the config says."""
    for weight in stored_tensors(folder):
        if weight.dtype not in _FLOATS and len(weight.shape) > 1 and weight.name.endswith("weight"):
            raise _quantized(name, f"{weight.name} is stored as {weight.dtype}")


def _quantized(name: str, how: str) -> UserError:
    return UserError(
        f"model {name!r}: its weights are quantized already ({how}), but the ladder is made from float weights: name the"
        f" checkpoint that it was made from, or dequantize it and save that ({_AS_A_RUNG})"
    )


def refuse_architecture(name: str, config: PretrainedConfig) -> None:
    """Raise a UserError if the model is no causal LM with a head."""
    architectures = config.architectures or []
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = f"type {config.model_type!r}"
    elif architectures and not any(architecture.endswith(_CAUSAL) for architecture in architectures):
        kind = architectures[0]
    else:
        return
    raise UserError(f"model {name!r}: {kind} is no causal LM with a head for its tokens, such as Qwen3ForCausalLM")


def stored_dtype(folder: Path) -> torch.dtype:
    """What most of the weights are stored as; float32 where there are none."""
    sizes: Counter[str] = Counter()
    for weight in stored_tensors(folder):
        sizes[weight.dtype] += math.prod(weight.shape)
    return _FLOATS.get(sizes.most_common(1)[0][0], torch.float32) if sizes else torch.float32


def has_weights(folder: Path) -> bool:
    """Whether its weights are here; of a hub model that nobody has loaded yet only its texts are."""
    return all((folder / file).is_file() for file in _weight_files(folder))


def _weight_files(folder: Path) -> list[str]:
    files = {WEIGHTS}
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        files = {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else set()
    return sorted(files)


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Each tensor that transformers would read, from the headers of the files.

    Raises:
        UserError: a file is missing, damaged or in another folder.
    """
    for file in _weight_files(folder):
        if Path(file).name != file:
            raise UserError(f"{folder / INDEX}: {file!r} is no file of this folder")
        try:
            with safe_open(folder / file, "pt") as tensors:
                for weight in tensors.keys():  # noqa: SIM118 - not a dict
                    part = tensors.get_slice(weight)
                    yield StoredTensor(weight, folder / file, part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / file} cannot be loaded: {' '.join(str(error).split())}") from error


def quantization(folder: Path) -> tuple[str, Mapping[str, object]] | None:
    """Method and settings of a quantized checkpoint, as its config or a quantizer's file beside it says; None of a float one."""
    config = _read_json(folder / "config.json")
    said = config.get("quantization_config") or config.get("compression_config")
    if isinstance(said, dict):
        return str(said.get("quant_method") or "bitsandbytes"), said  # which alone did without a name once
    for file, method in _QUANTIZERS_FILES.items():
        if (folder / file).is_file():
            return method, _read_json(folder / file)
    return None


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping is wanted, this is {type(content).__name__}")
    return content
