"""GPTQ and AWQ folders and GGUF files, written from the descriptions of their formats alone, and the weights that they mean."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]
"""Output of each 4 bits of a word, the lowest first."""


class Packed(NamedTuple):
    tensors: dict[str, torch.Tensor]
    weight: np.ndarray
    """What they mean: [outputs, inputs], float32."""


def words(integers: np.ndarray, bits: int) -> np.ndarray:
    """Each row's integers as one long number, the first lowest, cut into words of 32 bits."""
    rows = []
    for row in integers:
        number = sum(int(value) << (bits * place) for place, value in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), dtype="<i4"))
    return np.stack(rows)


def pack_layer(
    weight: np.ndarray,
    method: Literal["gptq", "gptq_v2", "awq"],
    bits: int,
    group: int,
    symmetric: bool = False,
    act_order: bool = False,
) -> Packed:
    """Round-to-nearest of a layer [outputs, inputs], in groups of inputs; in `act_order`, of inputs here and there."""
    outputs, inputs = weight.shape
    of_group = np.arange(inputs) // group
    if act_order:
        of_group = np.random.default_rng(0).permutation(of_group)
    groups, greatest = of_group.max() + 1, 2**bits - 1
    scales, zeros = np.zeros((groups, outputs), np.float16), np.zeros((groups, outputs), np.int64)
    integers, meant = np.zeros((inputs, outputs), np.int64), np.zeros((outputs, inputs), np.float32)
    for g in range(groups):
        part = weight[:, of_group == g]
        least, most = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            most = np.maximum(most, -least)
            least = -most
        scales[g] = (most - least) / greatest
        # v1 stores zeros less one, and has none of 0 here
        zeros[g] = 2 ** (bits - 1) if symmetric else np.clip(np.round(-least / scales[g]), method == "gptq", greatest)
    for i in range(inputs):
        scale, zero = scales[of_group[i]].astype(np.float32), zeros[of_group[i]]
        integers[i] = np.clip(np.round(weight[:, i] / scale) + zero, 0, greatest)
        meant[:, i] = scale * (integers[i] - zero).astype(np.float32)
    if method == "awq":
        places = np.concatenate([8 * word + np.array(AWQ_PLACES) for word in range(outputs // 8)])
        packed = {"qweight": words(integers[:, places], 4), "qzeros": words(zeros[:, places], 4)}
    else:
        packed = {"qweight": words(integers.T, bits).T, "qzeros": words(zeros - (method == "gptq"), bits)}
        packed["g_idx"] = of_group.astype(np.int32)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in packed.items()}
    return Packed(tensors | {"scales": torch.from_numpy(scales)}, meant)


def write_packed(
    model: PreTrainedModel,
    folder: Path,
    method: Literal["gptq", "gptq_v2", "awq"] = "gptq",
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    act_order: bool = False,
    files: int = 1,
) -> PreTrainedModel:
    """The model as a checkpoint with all linear layers but the head packed, the rest in float16; and the model that it is."""
    meant, tensors = copy.deepcopy(model), dict[str, torch.Tensor]()
    state = meant.state_dict()
    for tensor in state.values():
        tensor.copy_(tensor.half())
    layers = {
        name
        for name, module in meant.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lm_head" not in name
    }
    for name, parameter in meant.named_parameters():
        layer = name.removesuffix(".weight")
        if layer not in layers:
            tensors[name] = parameter.detach().half()
            continue
        transposed = isinstance(meant.get_submodule(layer), Conv1D)
        weight = parameter.detach().T if transposed else parameter.detach()
        inputs = weight.shape[1]
        packed = pack_layer(weight.numpy(), method, bits, inputs if group == -1 else group, symmetric, act_order)
        state[name].copy_(torch.from_numpy(packed.weight.T if transposed else packed.weight))
        tensors |= {f"{layer}.{part}": tensor for part, tensor in packed.tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    said: dict[str, object] = {"quant_method": method[:4].rstrip("_"), "bits": bits, "group_size": group}
    if method == "awq":
        said |= {"version": "gemm", "zero_point": True, "quant_method": "awq"}
    else:
        said |= {"checkpoint_format": method, "desc_act": act_order, "sym": symmetric}
    config = model.config.to_dict() | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return meant
    index = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        index |= dict.fromkeys(names[number::files], file)
        save_file({name: tensors[name] for name in names[number::files]}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return meant


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_BYTES_OF_32 = {"Q4_0": 18, "Q8_0": 34, "F16": 64, "F32": 128}


def _meant(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Rows of blocks as the values that they are, float32."""
    if kind in ("F16", "F32"):
        return blocks.astype(np.float32)
    by_block = blocks.reshape(blocks.shape[0], -1, _BYTES_OF_32[kind])
    scale = by_block[..., :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        integers = by_block[..., 2:].view(np.int8).astype(np.float32)
    else:
        integers = np.concatenate([by_block[..., 2:] & 15, by_block[..., 2:] >> 4], -1).astype(np.float32) - 8
    return (scale * integers).reshape(blocks.shape[0], -1)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    kind: str = "Q4_0",
    embedding: str = "Q8_0",
    tokens: list[str] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    split: str = "smollm",
    also: Callable[[GGUFWriter], None] = lambda _: None,
) -> tuple[PreTrainedModel, int]:
    """The model as a GGUF file; and the model that it is, with the bytes of all its tensors.

    Args:
        tokenizer: byte-level BPE that the file gets whole, with its chat template, in place of mere `tokens`.
        split: what the file then calls the splitting of text.
        also: writes something else to the file.
    """
    config = model.config
    writer = GGUFWriter(path, config.model_type)
    also(writer)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    normal, control, unused = 1, 3, 5
    if tokenizer is None:
        writer.add_token_list(tokens or [f"[PAD{i}]" for i in range(config.vocab_size)])
        writer.add_token_types([normal if tokens else unused] * config.vocab_size)
    else:
        bpe, special = json.loads(tokenizer.backend_tokenizer.to_str())["model"], set(tokenizer.all_special_ids)
        writer.add_tokenizer_pre(split)
        writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__))
        writer.add_token_types([control if i in special else normal for i in range(len(tokenizer))])
        writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_pad_token_id(tokenizer.pad_token_id)
        writer.add_unk_token_id(tokenizer.unk_token_id)
        writer.add_chat_template(tokenizer.chat_template)
    meant, size = copy.deepcopy(model), 0
    state = meant.state_dict()
    for name, parameter in model.named_parameters():
        layer, values = name.removesuffix(".weight"), parameter.detach().numpy()
        order = np.arange(len(values))
        if layer in ("model.embed_tokens", "lm_head", "model.norm"):
            stored = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}[layer]
        else:
            _, _, block, part = layer.split(".", 3)
            stored = f"blk.{block}.{_GGUF_NAMES[part]}"
            if config.model_type == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                # Row i and row i + half of a head turn together; llama.cpp wants them next to each other.
                half = config.head_dim // 2
                order = np.concatenate([h + np.array([[i, i + half] for i in range(half)]).ravel()
                                        for h in range(0, len(values), 2 * half)])  # fmt: skip
        used = "F32" if values.ndim == 1 else embedding if layer in ("model.embed_tokens", "lm_head") else kind
        blocks = quantize(np.ascontiguousarray(values[order]), GGMLQuantizationType[used])
        writer.add_tensor(f"{stored}.weight", blocks, raw_dtype=GGMLQuantizationType[used])
        state[name][order] = torch.from_numpy(_meant(blocks, used).reshape(values.shape))
        size += values.size * _BYTES_OF_32[used] // 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant, size
