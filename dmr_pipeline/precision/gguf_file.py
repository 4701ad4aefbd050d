"""GGUF files, llama.cpp's format, as the weights of a model that is there already. The package `gguf` reads the table of their
tensors; transformers dequantizes these and undoes how llama.cpp orders the rows of queries and keys."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from gguf import GGUFReader, ReaderTensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel

from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.imported_bytes import ImportedBytes

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_FLOATS = ("F16", "BF16", "F32", "F64")
_NORMAL = 1
"""llama.cpp's type of a token that is neither special nor added; it may spell these otherwise."""


def open_gguf(path: Path) -> GGUFReader:
    """The file's fields and the table of its tensors.

    Raises:
        UserError: it is cut or damaged, or one part of several.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"it is no whole GGUF file ({path.stat().st_size:,} bytes; {reason}): is it cut?") from error
    parts = reader.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise UserError("it is one file of several; join them with llama.cpp's `llama-gguf-split --merge`")
    return reader


def gguf_bytes(reader: GGUFReader, model: PreTrainedModel) -> tuple[int, ImportedBytes]:
    """Bits of most of the layers' weights, and what the file stores.

    Raises:
        UserError: its embeddings are not of the model's shape, no layer is quantized, or tensors are left over.
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    ours = model.get_input_embeddings().weight
    rows, width = ((0, 0) if _EMBEDDING not in tensors else tuple(map(int, reversed(tensors[_EMBEDDING].shape))))[:2]
    if rows != ours.shape[0]:
        raise UserError(
            f"it has embeddings of {rows} tokens, the agent of {ours.shape[0]}: it was made from another model"
        )
    if width != ours.shape[1]:
        raise UserError(f"its embeddings are {width} wide, the agent's {ours.shape[1]}: it was made from another model")
    types: Counter[str] = Counter()
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            types[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = types.most_common(1)[0][0] if types else "nothing"
    bits = re.match(r"[A-Z]+(\d)", kind)
    if kind in _FLOATS or bits is None:
        raise UserError(f"its layers are stored in {kind}, so it is no quantized model")
    refuse_left_over(reader, model)
    head = tensors.get(_HEAD)
    tied = ours is model.get_output_embeddings().weight
    if tied and head is not None:
        tied = head.tensor_type == tensors[_EMBEDDING].tensor_type and bool(
            (head.data == tensors[_EMBEDDING].data).all()
        )
    counted = [tensor for tensor in reader.tensors if not (tied and tensor is head)]
    return int(bits[1]), ImportedBytes(
        format="gguf",
        total=sum(int(tensor.n_bytes) for tensor in counted),
        embedding=int(tensors[_EMBEDDING].n_bytes),
        tied=tied,
        quantized_weights=sum(int(t.n_elements) for t in counted if t.tensor_type.name not in _FLOATS),
    )


def gguf_config(path: Path) -> PreTrainedConfig:
    """What the file says of its architecture."""
    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)


def gguf_vocabulary(reader: GGUFReader) -> dict[str, int] | None:
    """Token -> its number, of the file's tokenizer, where it has one; special and added tokens are left out."""
    tokens, types = reader.get_field("tokenizer.ggml.tokens"), reader.get_field("tokenizer.ggml.token_type")
    if tokens is None:
        return None
    kinds = [_NORMAL] * len(tokens.data) if types is None else types.contents()
    return {token: i for i, (token, kind) in enumerate(zip(tokens.contents(), kinds, strict=True)) if kind == _NORMAL}


def refuse_left_over(reader: GGUFReader, model: PreTrainedModel) -> None:
    """Transformers passes over tensors that it knows no place for.

    Args:
        model: that the file's tensors are to be all of. It may hold more, such as a head of its own.

    Raises:
        UserError: they are more numbers than the model has.
    """
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    counted = [t for t in reader.tensors if not t.name.startswith("rope_") and not (tied and t.name == _HEAD)]
    there = sum(int(tensor.n_elements) for tensor in counted)
    of_model = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if there > of_model:
        raise UserError(
            f"its tensors hold {there:,} numbers, the model that they are read into {of_model:,}: some are left over (of"
            f" {_kinds(counted)}), so that it would be another model"
        )


def _kinds(tensors: Sequence[ReaderTensor]) -> str:
    """What a layer's tensors are called, and those of no layer."""
    return ", ".join(sorted({re.sub(r"^blk\.\d+\.", "", tensor.name) for tensor in tensors}))


def load_gguf(path: Path, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A model of the config with the file's weights, dequantized.

    Raises:
        UserError: tensors of the model are missing or of another shape.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=config.dtype,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are named below
        output_loading_info=True,
    )
    unusable = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if unusable:
        raise UserError(
            f"missing or of another shape than the agent's: {', '.join(unusable[:3])}: it was made from another model"
        )
    return model.to(device)
