"""GPTQ (Frantar et al., 2023, arXiv 2210.17323): integers that keep what a layer computes on calibration text.

A layer's output error on inputs x is tr(E H E^T), with E what rounding changes in its weights and H the sum of x x^T (the
paper's Hessian, but for a factor of 2). Inputs are gone through one by one, in their order: a column of weights is rounded to
nearest, and what it lost is made up for as well as the columns that are left can do it. With H = U^-1 U^-T for U upper
triangular, that is column j's error over U_jj, times row j of U.

Decoder layers are rounded one after the other; each is calibrated on what those before it, rounded, make of the text. There is
one layer's Hessians in memory at a time, the hidden states of the text, and what the decoder gives each layer beside them. The
head can be the last of them.

The levels of a group are chosen when its first column is reached, from its weights as they are then. Of each output, what has
the lesser error is taken, GPTQ's integers or the nearest ones: going column by column is greedy, and no theorem says that it
ends below. That last step is ours.

Columns by decreasing inputs, with levels chosen beforehand, as some implementations have it, were tried on the demo's agent (64
calibration episodes, KL to float on 16 others): better at int4 (.0018 for .0028 nats an action), worse at int3 (.021 for .014)
and int2 (.118 for .100). Columns are gone through as they lie.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from optimum.quanto import AffineOptimizer, WeightQBitsTensor, qtype
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmr_pipeline.agent.logits import decoder_of
from dmr_pipeline.artifacts.resume import load_state, save_state
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.packing import Levels, group_size, nearest_integers, round_to_nearest

_COLUMNS = 128
"""Columns whose errors reach the columns behind them at once, in one product (the paper's blocks)."""

_Forward = Callable[[Tensor], Tensor]
"""Hidden states [1, tokens, width] -> what a part of the model makes of them."""
_LayerLevels = Mapping[str, Levels]
"""Of linear layers, by name."""


@dataclass(frozen=True)
class GptqRun:
    """What GPTQ works with, beside model and rung."""

    sequences: Sequence[Sequence[int]]
    """Tokens of calibration texts."""
    damping: float
    """What is added to a Hessian's diagonal, as a share of its mean."""
    scratch: Path
    """Folder of this rung alone, where each decoder layer is kept once it is done; it need not exist."""
    on_layer: Callable[[int, int], None] = lambda done, layers: None
    """Called with the number of layers that are done, and of all: the decoder's, and the head where it is rounded too."""


class GptqHead(NamedTuple):
    """How the head is rounded, after the decoder's layers."""

    name: str
    kind: qtype
    """Integers of 4, 3 or 2 bits."""


@torch.no_grad()
def rounded_by_gptq(
    model: PreTrainedModel,
    kept: Sequence[str],
    kind: qtype,
    optimizer: AffineOptimizer,
    run: GptqRun,
    head: GptqHead | None = None,
) -> dict[str, WeightQBitsTensor]:
    """Weights of all linear layers of the decoder's layers, by name, but for those that patterns in `kept` fit; and the head's.

    The model's own weights become, layer by layer, the rounded ones; those of the head stay as they are.

    Args:
        model: float, in evaluation mode.
        kind: integers of 4, 3 or 2 bits.
        optimizer: chooses the levels of a group.
        head: None leaves it out.

    Raises:
        UserError: there is no text, the model's layers cannot be found or gone through one by one, a layer's inputs are not
            finite, or it is not found what the last layer's output goes through on its way to the head.
    """
    if not any(run.sequences):
        raise UserError("rounding: gptq: there is no text to calibrate on")
    names = {module: name for name, module in model.named_modules()}
    layers = _layers_of(model)
    states, calls = _start(model, layers, run.sequences)
    last = None if head is None else _before_the_head(model, layers, run.sequences)
    count = len(layers) + (head is not None)
    rounded: dict[str, WeightQBitsTensor] = {}

    def levels_of(
        linear: Mapping[str, nn.Linear], kept_as: str, forward: Sequence[_Forward], its: qtype
    ) -> _LayerLevels:
        """Those of an earlier run, where it came so far."""
        path = run.scratch / f"{kept_as}.pt"
        state = load_state(path, model.device)
        if state is None:
            state = _round_layer(linear, forward, states, its, optimizer, run.damping)
            run.scratch.mkdir(parents=True, exist_ok=True)
            save_state(path, state)
        return {name: Levels(*levels) for name, levels in state.items()}

    for number, layer in enumerate(layers):
        linear = {
            names[module]: module
            for module in layer.modules()
            if isinstance(module, nn.Linear) and not any(fnmatch(names[module], pattern) for pattern in kept)
        }
        forward = [partial(call.output, layer) for call in (of_text[number] for of_text in calls)]
        levels = levels_of(linear, f"layer-{number}", forward, kind)
        for name, module in linear.items():
            shape = module.weight.shape
            module.weight = nn.Parameter(levels[name].weights(shape), requires_grad=False)
            rounded[name] = levels[name].packed(shape, kind)
        states = [output(hidden) for output, hidden in zip(forward, states, strict=True)]
        for name, module in linear.items():  # the layer is not called again
            module.weight = nn.Parameter(rounded[name], requires_grad=False)
        run.on_layer(number + 1, count)
    if head is not None and last is not None:
        module = model.get_submodule(head.name)
        assert isinstance(module, nn.Linear)
        levels = levels_of({head.name: module}, "head", [lambda hidden: module(last(hidden))] * len(states), head.kind)
        rounded[head.name] = levels[head.name].packed(module.weight.shape, head.kind)
        run.on_layer(count, count)
    return rounded


def _round_layer(
    linear: Mapping[str, nn.Linear],
    forward: Sequence[Callable[[Tensor], Tensor]],
    states: Sequence[Tensor],
    kind: qtype,
    optimizer: AffineOptimizer,
    damping: float,
) -> dict[str, tuple[Tensor, ...]]:
    """Levels of linear layers, by name, that are calibrated while a decoder layer reads each text."""
    hessians, state = _hessians(linear, forward, states), {}
    for name, module in linear.items():
        hessian = hessians.of(name, module)
        if not hessian.isfinite().all():
            raise UserError(f"rounding: gptq: {name} has inputs that are not finite: calibrate on other text")
        state[name] = tuple(round_by_gptq(module.weight, hessian, kind, optimizer, damping))
    return state


def round_by_gptq(weight: Tensor, hessian: Tensor, kind: qtype, optimizer: AffineOptimizer, damping: float) -> Levels:
    """Levels of a linear layer's weights [outputs, inputs].

    Args:
        hessian: float64 [inputs, inputs], the sum of x x^T over the inputs x that the layer is to be true to. Where it is zero,
            nothing is known of them, and the levels are the nearest ones.
        damping: share of the mean of its diagonal that is added to the diagonal.
    """
    nearest = round_to_nearest(weight, kind, optimizer)
    width = weight.shape[1]
    mean = float(hessian.diagonal().mean())
    if mean == 0:
        return nearest
    damped = hessian + damping * mean * torch.eye(width, dtype=hessian.dtype, device=hessian.device)
    found = _column_by_column(weight, _factor(damped), kind, optimizer)
    errors = [output_error(weight, levels.weights(weight.shape), hessian) for levels in (found, nearest)]
    better = (errors[0] <= errors[1]).repeat_interleave(len(found.scale) // len(weight))[:, None]
    return Levels(*(torch.where(better, mine, other) for mine, other in zip(found, nearest, strict=True)))


def output_error(weight: Tensor, stored: Tensor, hessian: Tensor) -> Tensor:
    """Squared error of each output, summed over the inputs that the Hessian is of: float64 [outputs]."""
    change = weight.double() - stored.double()
    return ((change @ hessian) * change).sum(1)


def _factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with H^-1 = U^T U."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _column_by_column(weight: Tensor, factor: Tensor, kind: qtype, optimizer: AffineOptimizer) -> Levels:
    rows, width = weight.shape
    size = group_size(width) or width
    # Groups begin where all errors of the columns before have been made up for.
    step = _COLUMNS // size * size or _COLUMNS
    left = weight.double()
    integers = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
    scales, shifts = [], []
    for first in range(0, width, step):
        last = min(first + step, width)
        errors = left.new_empty(rows, last - first)
        for column in range(first, last):
            if column % size == 0:
                scale, shift = optimizer.optimize(left[:, column : column + size].to(weight.dtype), kind, 0)
                scales.append(scale)
                shifts.append(shift)
            exact = left[:, column : column + 1].clone()
            chosen = nearest_integers(exact.to(weight.dtype), kind, scale, shift)
            error = (exact - (scale * chosen - shift).double()) / factor[column, column]
            left[:, column:last] -= error * factor[column, column:last]
            integers[:, column : column + 1], errors[:, column - first : column - first + 1] = chosen, error
        left[:, last:] -= errors @ factor[first:last, last:]
    scale, shift = (torch.stack(found, 1).reshape(-1, 1) for found in (scales, shifts))
    return Levels(integers.reshape(-1, size), scale, shift)


class _Call(NamedTuple):
    """How the decoder calls one of its layers on a text, but for the hidden states."""

    by_name: bool
    """Are the hidden states given by their name?"""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def output(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states [1, tokens, width] that the layer makes of others."""
        if self.by_name:
            return _hidden(layer(*self.args, hidden_states=hidden, **self.kwargs))
        return _hidden(layer(hidden, *self.args, **self.kwargs))


def _hidden(output: Any) -> Tensor:  # noqa: ANN401 - layers give hidden states alone, or first of a tuple
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _layers_of(model: PreTrainedModel) -> nn.ModuleList:
    decoder, depth = decoder_of(model), model.config.get_text_config().num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise _refusal(model, "are not found")


def _start(
    model: PreTrainedModel, layers: nn.ModuleList, sequences: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[list[_Call]]]:
    """Of each text, what comes into the first layer, and how each layer is called.

    Raises:
        UserError: what comes into a layer is not what the one before has made.
    """
    states: list[Tensor] = []
    calls: list[list[_Call]] = []
    made: Tensor | None = None

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_name = not args
        hidden = kwargs["hidden_states"] if by_name else args[0]
        if made is None:
            states.append(hidden)
        elif not torch.equal(hidden, made):
            raise _refusal(model, "do not follow one another")
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls[-1].append(_Call(by_name, args[1:], others))

    def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        nonlocal made
        made = _hidden(output)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(after))
        for sequence in sequences:
            made = None
            calls.append([])
            decoder_of(model)(input_ids=torch.tensor([sequence], device=model.device), use_cache=False)
            if len(calls[-1]) != len(layers):
                raise _refusal(model, "do not follow one another")
    return states, calls


def _before_the_head(model: PreTrainedModel, layers: nn.ModuleList, sequences: Sequence[Sequence[int]]) -> _Forward:
    """What the last layer's output goes through before the decoder returns it: a norm.

    Raises:
        UserError: it is not one module.
    """
    decoder, text = decoder_of(model), next(sequence for sequence in sequences if sequence)
    made: list[Tensor] = []
    after: list[nn.Module] = []

    def ask(module: nn.Module, args: tuple[Any, ...]) -> None:
        if made and args and args[0] is made[0]:
            after.append(module)

    within = {id(module) for layer in layers for module in layer.modules()}
    with ExitStack() as hooks:
        hooks.enter_context(layers[-1].register_forward_hook(lambda *call: made.append(_hidden(call[-1]))))
        for module in decoder.modules():
            if id(module) not in within:
                hooks.enter_context(module.register_forward_pre_hook(ask))
        out = decoder(input_ids=torch.tensor([text], device=model.device), use_cache=False).last_hidden_state
    if len(after) != 1 or not torch.equal(after[0](made[0]), out):
        raise UserError(
            f"head: in a model of type {model.config.model_type!r} it is not found what comes between the last layer and the"
            " head, so GPTQ cannot round it; give the head int8, or leave it out"
        )
    return after[0]


class _Hessians:
    """The sum of x x^T over all inputs x of each of some linear layers. Those that are given the same tensor (queries, keys and
    values; gate and up) share one."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}
        self._new: list[tuple[Tensor, str]] = []

    def next_text(self) -> None:
        """Tensors of the text before are let go of, and with them the sharing of what was first met there is settled."""
        self._new.clear()

    def see(self, name: str, inputs: Tensor) -> None:
        """float [..., inputs] of a layer; products in float32, sums in float64."""
        if name not in self._leader:
            self._leader[name] = next((leader for tensor, leader in self._new if tensor is inputs), name)
            self._new.append((inputs, self._leader[name]))
        if self._leader[name] == name:
            flat = inputs.flatten(0, -2).float()
            product = (flat.T @ flat).double()
            self._sums[name] = self._sums[name] + product if name in self._sums else product

    def of(self, name: str, layer: nn.Linear) -> Tensor:
        """float64 [inputs, inputs]; 0 for a layer that no input came to."""
        if name in self._leader:
            return self._sums[self._leader[name]]
        return torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=layer.weight.device)


def _hessians(
    linear: Mapping[str, nn.Linear], forward: Sequence[Callable[[Tensor], Tensor]], states: Sequence[Tensor]
) -> _Hessians:
    """Of linear layers, while a decoder layer reads each text."""
    hessians = _Hessians()
    with ExitStack() as hooks:
        for name, module in linear.items():
            see = partial(hessians.see, name)
            hooks.enter_context(module.register_forward_pre_hook(lambda _, args, see=see: see(args[0])))
        for output, hidden in zip(forward, states, strict=True):
            output(hidden)
            hessians.next_text()
    return hessians


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"rounding: gptq goes through the model's layers one by one, and those of model type {model.config.model_type!r}"
        f" {reason}; leave it out"
    )
