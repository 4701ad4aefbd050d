"""The precision ladder: one float checkpoint at several weight precisions, through optimum-quanto.

Round-to-nearest quantization of the linear layers, without data: int8 symmetric with one scale for each output row;
int4, int3 and int2 affine (scale and shift) in groups along the input, over their whole range or, where a rung says so, over
the part of it with the least squared error. quanto chooses the group size from the input width alone: up to 128 inputs, one
group a row; above, 128, less 32 for as long as it does not divide the width (160 and 224: 32; 192: 96; 320: 64), and one
group a row where not even 32 does. int3, which quanto does not have, is that of `packing`.

With `rounding: gptq` the layers of the decoder are rounded by GPTQ (`gptq`) on text, to levels that are stored in the same way.

The head is in float unless the rung says otherwise: with `head: int8` it has weights of its own, also where it is tied to the
input embedding, which stays in float, a lookup; with int4 or int3 these are rounded as the others are.

int4, int3 and int2 fail under `torch.inference_mode`; use `torch.no_grad`.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from optimum.quanto import (
    AffineOptimizer,
    Calibration,
    MaxOptimizer,
    QLinear,
    QModuleMixin,
    WeightQBitsTensor,
    qtype,
    qtypes,
    quantization_map,
    quantize,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dmr_pipeline.agent.checkpoint import drop_versions, rung_config
from dmr_pipeline.agent.formats import refuse_pickles
from dmr_pipeline.agent.memory import give_back_freed
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.gptq import GptqHead, GptqRun, rounded_by_gptq
from dmr_pipeline.precision.imported import load_imported
from dmr_pipeline.precision.imported_bytes import IMPORTED_FILE, imported_bytes
from dmr_pipeline.precision.packing import group_size, qint3, round_to_nearest
from dmr_pipeline.recipe.precisions import GROUPED, Rung

WEIGHTS_FILE = "model.safetensors"
MAP_FILE = "quantization_map.json"


_SHARES = [1 - step / 40 for step in range(29)]
"""Parts of its range that a group may be given, from all of it to 30%."""


class MseRanges(AffineOptimizer):
    """Scale and shift of each group by the part of its range, of those in `_SHARES`, that is nearest to the weights in the
    mean square; of equal ones the largest. A part lies about the mean of the group. This search is ours."""

    def optimize(self, base: Tensor, qtype: qtype, axis: int | None) -> tuple[Tensor, Tensor]:
        """Weights [groups, weights of a group] -> scale and shift [groups, 1] of their dtype, which make of an integer the
        weight scale * integer - shift. `axis` is that of the groups, which in a linear layer is always the first."""
        weights, greatest = base.float(), 2**qtype.bits - 1
        least, mean = weights.amin(1, keepdim=True), weights.mean(1, keepdim=True)
        span = weights.amax(1, keepdim=True) - least
        scale, shift, error = span / greatest, -least, torch.full_like(span, torch.inf)
        for share in _SHARES:
            new_scale, new_shift = span * share / greatest, -(mean + share * (least - mean))
            nearest = ((weights + new_shift) / new_scale).round().clamp(0, greatest)
            new_error = (nearest * new_scale - new_shift - weights).square().sum(1, keepdim=True)
            better = new_error < error  # not of NaN, as where all weights of a group are equal: its scale is 0 anyway
            scale, shift = torch.where(better, new_scale, scale), torch.where(better, new_shift, shift)
            error = torch.where(better, new_error, error)
        return scale.to(base.dtype), shift.to(base.dtype)


LEAST_SHARE = 0.9
"""Of the weights that a rung is to quantize, the share that must be quantized; less is not the precision that its name says."""


class RungSize(NamedTuple):
    bytes: int
    """All stored weights: packed integers, scales and shifts, and what is left in float; 16 bits a float, tied weights once."""
    bits_per_weight: float
    """Of all weights, the float ones among them."""
    quantized_share: float
    """Weights that are quantized, of all weights."""


def quantize_rung(
    model: PreTrainedModel,
    rung: Rung,
    calibration: Callable[[PreTrainedModel], object] | None = None,
    gptq: GptqRun | None = None,
) -> PreTrainedModel:
    """A copy of the float model at the rung's precision, frozen and in evaluation mode; a float rung is the model itself. What is
    not quantized (embeddings, norms) is shared with the float model, and layers are quantized one by one: the float weights are
    never there twice.

    With `activations: int8`, the inputs of the quantized layers are rounded to int8 too, with one scale a layer.
    quanto's default would round outputs as well, unless calibration finds that nobody uses them as integers, which it
    then does not save; ours rounds inputs only.

    Args:
        model: float model; its weights stay as they are.
        rung: what to quantize. `keep_float` are glob patterns of module names; `lm_head` is the model's output embeddings,
            whatever it calls them.
        calibration: runs the model it is given on typical text; needed for quantized activations.
        gptq: needed for `rounding: gptq`.

    Raises:
        UserError: a `keep_float` pattern fits no module, activations are to be quantized without calibration or in a float
            rung, the head is no linear layer and is to be quantized, too many weights are in layers that cannot be, or the model
            has no layers that GPTQ could go through.
    """
    if rung.activations != "none" and (rung.weights == "float" or calibration is None):
        raise UserError(f"rung {rung.name!r}: quantized activations need quantized weights and a calibration")
    if rung.rounding is not None and gptq is None:
        raise UserError(f"rung {rung.name!r}: rounding: gptq needs calibration episodes")
    if rung.weights == "float":
        return model.eval()
    kept = _kept_patterns(model, rung)
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()}).eval()
    _conv1d_to_linear(model)
    activations = None if rung.activations == "none" else f"q{rung.activations}"
    optimizer = MseRanges() if rung.ranges == "mse" else None
    head = None
    if rung.head is not None:
        head = _linear_head(model, rung)
        kept.append(head)
    rounded: dict[str, WeightQBitsTensor] = {}
    if rung.rounding is not None and gptq is not None:
        of_head = GptqHead(head, _kind(rung.head)) if head is not None and rung.head in GROUPED else None
        rounded = rounded_by_gptq(model, kept, _kind(rung.weights), optimizer or MaxOptimizer(), gptq, of_head)
    if head is not None:
        _quantize_head(model, head, rung.head, optimizer, rounded)
    _quantize(model, f"q{rung.weights}", activations, optimizer, exclude=kept, rounded=rounded)
    _refuse_float_layers(model, rung, kept)
    if activations is not None and calibration is not None:
        with torch.no_grad(), Calibration(streamline=False):
            calibration(model)
    return model


def _kept_patterns(model: PreTrainedModel, rung: Rung) -> list[str]:
    """The rung's patterns of module names, with the model's own name of its head."""
    modules = dict(model.named_modules())
    kept = list(rung.keep_float)
    if "lm_head" in kept and "lm_head" not in modules:
        head = _head_name(model)
        kept += [] if head is None else [head]
        kept.remove("lm_head")
    for pattern in kept:
        if not any(fnmatch(name, pattern) for name in modules):
            linear = {
                name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)
            }
            raise UserError(
                f"rung {rung.name!r}: keep_float pattern {pattern!r} fits no module of the model, whose linear layers are"
                f" called {', '.join(sorted(linear))}"
            )
    return kept


def _head_name(model: PreTrainedModel) -> str | None:
    """What the model calls its output embeddings."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def _linear_head(model: PreTrainedModel, rung: Rung) -> str:
    """What the model calls its head."""
    name = _head_name(model)
    if name is None or not isinstance(model.get_submodule(name), nn.Linear):
        raise UserError(f"rung {rung.name!r}: head: the model's head is no linear layer; leave it out")
    return name


def _quantize_head(
    model: PreTrainedModel,
    name: str,
    weights: str | None,
    optimizer: AffineOptimizer | None,
    rounded: Mapping[str, WeightQBitsTensor],
) -> None:
    """Give the model a head of the rung's own, in place. An input embedding tied to it stays as it is."""
    head = model.get_submodule(name)
    if isinstance(head.bias, nn.Parameter):
        # One that is tied to another parameter would not be read again once the config says that nothing is tied.
        head.bias = nn.Parameter(head.bias.detach().clone(), requires_grad=False)
    own = {name: rounded[name]} if name in rounded else {}
    _quantize(model, f"q{weights}", None, optimizer if weights in GROUPED else None, include=[name], rounded=own)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _kind(weights: str | None) -> qtype:
    """quanto's own, and ours."""
    return qtypes[f"q{weights}"]


def _conv1d_to_linear(model: PreTrainedModel) -> None:
    """Make GPT-2's layers linear ones, in place: quanto knows only these, and with the weight transposed they do the same."""
    for name in [name for name, module in model.named_modules() if isinstance(module, Conv1D)]:
        old = model.get_submodule(name)
        inputs, outputs = old.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight = nn.Parameter(old.weight.detach().T.contiguous(), requires_grad=old.weight.requires_grad)
        linear.bias = old.bias
        model.set_submodule(name, linear)


def _refuse_float_layers(model: PreTrainedModel, rung: Rung, kept: list[str]) -> None:
    """Raise a UserError if of all matrices, embeddings and `kept` modules aside, too many weights are still float."""
    sizes, left = {True: 0, False: 0}, Counter[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or any(fnmatch(name, pattern) for pattern in kept):
            continue
        quantized = isinstance(module, QModuleMixin) and module.weight_qtype is not None
        matrices = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
        sizes[quantized] += matrices
        if not quantized:
            left[f"{type(module).__name__} ({name})"] = matrices
    share = sizes[True] / max(1, sum(sizes.values()))
    if share < LEAST_SHARE:
        raise UserError(
            f"rung {rung.name!r} would leave {1 - share:.0%} of the weights in float that it is to quantize:"
            f" {left.most_common(1)[0][0]} and the like are no linear layers; choose another model, or keep them in float"
            " by name (keep_float)"
        )


def save_rung(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json, model.safetensors and quantization_map.json (empty for float); equal models, equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rung_config(model).save_pretrained(folder)
    drop_versions(folder)
    save_model(model, str(folder / WEIGHTS_FILE))
    text = json.dumps(quantization_map(model), indent=2, sort_keys=True) + "\n"
    (folder / MAP_FILE).write_text(text, encoding="utf-8")


def load_rung(folder: Path, device: torch.device) -> PreTrainedModel:
    """Read what `save_rung` or `import_rung` wrote, in evaluation mode; its tensors and logits are bit-identical to those saved.

    Its weights are there once, as they are stored: those that the model is built with are never made. Its buffers are, since
    rotary frequencies are in no file.

    Raises:
        UserError: the folder or a file is missing or damaged, or the weights are a pickle.
    """
    if (folder / IMPORTED_FILE).is_file():
        return load_imported(folder, device)
    if not (folder / MAP_FILE).is_file():
        raise UserError(f"{folder} is no rung of the ladder: it has no {MAP_FILE}")
    refuse_pickles(folder)
    try:
        modules = json.loads((folder / MAP_FILE).read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False), device:
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=False)
        model.tie_weights()  # within, each weight is made anew
        if modules:
            _conv1d_to_linear(model)
        for name, types in modules.items():
            activations = None if types["activations"] == "none" else types["activations"]
            _to_quantized_layers(model, types["weights"], activations, None, include=[name])
        _fill(model, load_file(folder / WEIGHTS_FILE, device=str(device)))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"rung {folder} cannot be loaded: {' '.join(str(error).split())}") from error
    return model.eval()


def _fill(model: PreTrainedModel, stored: dict[str, Tensor]) -> None:
    """Give a model without weights those of a file, each under all of its names where it is tied.

    Raises:
        RuntimeError: a weight is missing, or is none of the model's.
    """
    packed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QModuleMixin)}
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in packed:
            tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        found = next((stored[name] for name in names if name in stored), None)
        if found is not None:
            stored.update(dict.fromkeys(names, found))
    model.load_state_dict(stored, assign=True)
    stored.clear()
    for names in tied.values():
        # In a file weights lie unaligned, and on a CPU what is read of it is the file itself.
        weight = nn.Parameter(model.get_parameter(names[0]).detach().clone(), requires_grad=False)
        for name in names:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, weight)


def stored_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of each stored tensor by its name in the state dict; tied ones count once, under their first name. Floats count 16
    bits each, whatever they are computed in: that a CPU computes in float32 makes no weight larger."""
    unused = {
        f"{name}.{scale}"
        for name, module in model.named_modules()
        if isinstance(module, QModuleMixin) and module.activation_qtype is None
        for scale in ("input_scale", "output_scale")
    }
    sizes: dict[int, tuple[str, int]] = {}
    for name, tensor in model.state_dict().items():
        if name not in unused:
            size = 2 * tensor.numel() if tensor.is_floating_point() else tensor.nbytes
            sizes.setdefault(tensor.data_ptr(), (name, size))
    return dict(sizes.values())


def rung_size(model: PreTrainedModel) -> RungSize:
    """Storage of the weights, in the file and, where floats have 16 bits, in memory."""
    total, weights = sum(stored_bytes(model).values()), sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(module.weight.numel() for module in model.modules() if isinstance(module, QLinear))
    return RungSize(total, 8 * total / weights, quantized / weights)


def stored_size(model: PreTrainedModel, folder: Path) -> RungSize:
    """Storage of the weights of a rung that was loaded from the folder. An imported one is plain float in memory: its size is
    that of the files that it was read from."""
    imported = imported_bytes(folder)
    if imported is None:
        return rung_size(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return RungSize(imported.total, 8 * imported.total / weights, imported.quantized_weights / weights)


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Make the quantized layers plain float ones that compute the same, in float32 bit for bit, for acting where there are
    no low-bit kernels. In place, layer by layer, so that the model is never there twice.

    On a CPU quanto dequantizes every weight in every forward pass, which takes most of a tiny model's time. Here it is
    done once. Sizes and costs are those of the quantized model. A model with quantized activations has no plain float
    equal: it stays as it is.
    """
    if any(isinstance(module, QModuleMixin) and module.activation_qtype is not None for module in model.modules()):
        return model
    for name in [name for name, module in model.named_modules() if isinstance(module, QLinear)]:
        module = model.get_submodule(name)
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        linear.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
        linear.bias = module.bias
        model.set_submodule(name, linear)
        del module
        give_back_freed(linear.weight.nbytes)
    return model.eval()


def _quantize(
    model: PreTrainedModel,
    weights: str,
    activations: str | None,
    optimizer: AffineOptimizer | None = None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    rounded: Mapping[str, WeightQBitsTensor] = MappingProxyType({}),
) -> None:
    """In place. `rounded` has the weights of some of the layers, by name; those of all others are rounded to nearest."""
    _to_quantized_layers(model, weights, activations, optimizer, include, exclude)
    for name, module in model.named_modules():
        if name in rounded:
            module.weight = nn.Parameter(rounded[name])
        elif isinstance(module, QLinear) and module.weight_qtype == qint3 and not module.frozen:
            levels = round_to_nearest(module.weight, qint3, optimizer or MaxOptimizer())
            module.weight = nn.Parameter(levels.packed(module.weight.shape, qint3))
        if isinstance(module, QModuleMixin):
            module.freeze()
            give_back_freed(module.weight.nbytes)


def _to_quantized_layers(
    model: PreTrainedModel,
    weights: str,
    activations: str | None,
    optimizer: AffineOptimizer | None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
) -> None:
    """In place. Their weights are still in float."""
    quantize(model, weights=weights, activations=activations, optimizer=optimizer, include=include, exclude=exclude)
    for module in model.modules():
        if isinstance(module, QModuleMixin):
            module.disable_output_quantization()
        if isinstance(module, QLinear) and module.weight_qtype == qint3:
            module.weight_group_size = group_size(module.in_features)
