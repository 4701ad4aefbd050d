"""GPTQ and AWQ checkpoints as the weights of a model that is there already: what is checked of them, and how they are read."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dmr_pipeline.agent.checkpoint import load_tokenizer
from dmr_pipeline.agent.formats import StoredTensor, quantization, refuse_pickles, stored_tensors
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.imported_bytes import ImportedBytes
from dmr_pipeline.precision.packed_weights import PARTS, Layout, dequantize_layer, layout_of

_WHOLE = "weight"
"""The part that a weight, or another tensor, is which is stored as it is."""
_IGNORED = re.compile(r".*rotary_emb\.inv_freq")
"""What old checkpoints store of what a config says."""

Parts = Mapping[str, Mapping[str, StoredTensor]]
"""Tensor of the float model -> part -> where it is stored."""


def read_layout(folder: Path) -> Layout:
    """How the folder's weights are packed.

    Raises:
        UserError: not in a way that is read here, or not at all; pickles.
    """
    found = quantization(folder)
    if found is None:
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        raise UserError(
            f"it is a folder of GGUF files: name one of them, such as {ggufs[0]}"
            if ggufs
            else "its weights are not quantized (no quantization_config); gptq, awq and GGUF files can be imported"
        )
    return layout_of(*found)


def packed_config(folder: Path) -> PreTrainedConfig:
    """What the checkpoint says of its architecture."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def packed_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> its number, of the tokenizer beside the weights, where there is one."""
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return load_tokenizer(folder).get_vocab()


def packed_bytes(folder: Path, layout: Layout, model: PreTrainedModel) -> ImportedBytes:
    """What the folder stores of the model, from the headers of its files.

    Raises:
        UserError: a tensor of the model is missing, one is left over, or a shape is not the model's.
    """
    refuse_pickles(folder)
    parts = _parts(folder)
    embedding, head = (_weight_of(model, module) for module in (model.get_input_embeddings(), _head(model)))
    tied = model.get_input_embeddings().weight is _head(model).weight
    if tied and head in parts and head != embedding:
        tied = _equal(parts[head], parts.get(embedding, {}))
    if embedding in parts:
        if _WHOLE not in parts[embedding]:
            raise UserError(f"{embedding} is packed; only linear layers may be")
        rows, wanted = parts[embedding][_WHOLE].shape[0], model.get_input_embeddings().weight.shape[0]
        if rows != wanted:
            raise UserError(
                f"it has embeddings of {rows} tokens, the agent of {wanted}: it was made from another model"
            )
    _refuse_other_tensors(parts, layout, model, {head} if tied else set())
    sizes = {name: _bytes(stored) for name, stored in parts.items() if not (tied and name == head)}
    weights = {name: tensor.numel() for name, tensor in model.state_dict().items() if "qweight" in parts.get(name, {})}
    return ImportedBytes(
        format=layout.method,
        total=sum(sizes.values()),
        embedding=_bytes(parts[embedding]),
        tied=tied,
        quantized_weights=sum(weights.values()),
    )


@torch.no_grad()
def fill(model: PreTrainedModel, folder: Path, layout: Layout) -> None:
    """Set the model's tensors to what the folder stores, dequantized on the model's device, one after the other.

    Raises:
        UserError: as `packed_bytes`.
    """
    parts, state = _parts(folder), model.state_dict()
    head = _weight_of(model, _head(model))
    tied = model.get_input_embeddings().weight is _head(model).weight
    _refuse_other_tensors(parts, layout, model, {head} if tied else set())
    with ExitStack() as files:
        opened = {
            file: files.enter_context(safe_open(file, "pt", device=str(model.device)))
            for file in {part.file for stored in parts.values() for part in stored.values()}
        }
        for name in sorted(parts.keys() & state.keys()):
            tensors = {part: opened[stored.file].get_tensor(stored.name) for part, stored in parts[name].items()}
            if "qweight" not in tensors:
                state[name].copy_(tensors[_WHOLE])
                continue
            try:
                weight = dequantize_layer(layout, tensors)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            state[name].copy_(weight.T if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else weight)


def source_files(folder: Path) -> list[Path]:
    """The files without which the folder cannot be read: configs and weights."""
    configs = [path for path in folder.glob("*.json") if path.name.endswith(("config.json", ".index.json"))]
    configs = [path for path in configs if not path.name.startswith(("tokenizer", "generation"))]
    return sorted({*configs, *(tensor.file for tensor in stored_tensors(folder))})


def _parts(folder: Path) -> Parts:
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for tensor in stored_tensors(folder):
        layer, _, part = tensor.name.rpartition(".")
        if part in PARTS:
            parts[f"{layer}.weight"][part] = tensor
        elif not _IGNORED.fullmatch(tensor.name):
            parts[tensor.name][_WHOLE] = tensor
    return parts


def _refuse_other_tensors(parts: Parts, layout: Layout, model: PreTrainedModel, optional: set[str]) -> None:
    """Raise a UserError unless the checkpoint has all of the model's tensors in their shapes, and no others. A bias of zeros,
    which old quantizers added to layers without one, does not count."""
    state = model.state_dict()
    missing = sorted(state.keys() - parts.keys() - optional)
    extra = sorted(name for name in parts.keys() - state.keys() if not _zero_bias(name, parts[name]))
    if missing or extra:
        said = [f"{'no' if names is missing else 'a'} {names[0]}" for names in (missing, extra) if names]
        counts = f"{len(missing)} missing, {len(extra)} left over"
        raise UserError(
            f"it has {' and '.join(said)} ({counts} of the agent's tensors): it was made from another model"
        )
    for name in sorted(state.keys() & parts.keys()):
        stored, shape = parts[name], tuple(state[name].shape)
        wanted = {_WHOLE: shape}
        if "qweight" in stored:
            module = model.get_submodule(name.rpartition(".")[0])
            wanted = layout.shapes(*(shape if isinstance(module, Conv1D) else shape[::-1]))
        for part in wanted.keys() | stored.keys():
            if part == "g_idx" and part not in stored:
                continue
            if part not in stored or part not in wanted:
                raise UserError(
                    f"{name} is incomplete: {', '.join(sorted(stored))}; {', '.join(sorted(wanted))} are needed"
                )
            if stored[part].shape != wanted[part]:
                raise UserError(
                    f"{stored[part].name} has the shape {list(stored[part].shape)}, where the agent needs"
                    f" {list(wanted[part])}: it was made from another model, or its config is not its own"
                )
            integer = part in PARTS and part != "scales"
            if stored[part].dtype not in (("I32",) if integer else ("F16", "BF16", "F32", "F64")):
                raise UserError(f"{stored[part].name} is stored as {stored[part].dtype}, which is not read")


def _zero_bias(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    return name.endswith(".bias") and not bool(_read(stored[_WHOLE]).any())


def _equal(one: Mapping[str, StoredTensor], other: Mapping[str, StoredTensor]) -> bool:
    """Whether two weights that are stored as they are have equal values."""
    if one.keys() != {_WHOLE} or other.keys() != {_WHOLE} or one[_WHOLE].shape != other[_WHOLE].shape:
        return False
    return torch.equal(_read(one[_WHOLE]), _read(other[_WHOLE]))


def _read(tensor: StoredTensor) -> Tensor:
    with safe_open(tensor.file, "pt") as file:
        return file.get_tensor(tensor.name)


def _bytes(stored: Mapping[str, StoredTensor]) -> int:
    """Of tensors whose dtypes' names say their bits."""
    return sum(math.prod(part.shape) * int(part.dtype.strip("BFI")) // 8 for part in stored.values())


def _head(model: PreTrainedModel) -> torch.nn.Module:
    return model.get_output_embeddings()


def _weight_of(model: PreTrainedModel, wanted: torch.nn.Module) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if module is wanted)
