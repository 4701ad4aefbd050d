"""Rungs as they act."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from optimum.quanto import QTensor
from torch import Tensor
from transformers import PreTrainedModel

from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.kernels import with_kernels
from dmr_pipeline.precision.pass_bytes import PassBytes, stored_pass_bytes
from dmr_pipeline.precision.quantization import dequantize, load_rung


@dataclass(frozen=True)
class ActingModels:
    """The rungs that a router chooses from, or one alone, loaded for acting. All mappings are dearest first."""

    models: Mapping[str, PreTrainedModel]
    """Rung -> what computes when it acts."""
    pass_bytes: Mapping[str, PassBytes]
    """Rung -> what one forward pass reads."""
    device: torch.device

    @classmethod
    def load(
        cls, checkpoints: Path, rungs: Sequence[str], device: torch.device, kernels: Literal["low_bit"] | None = None
    ) -> "ActingModels":
        """From the folder of the stage `quantized_checkpoints`. Weights that are equal between rungs (embeddings, norms) are in
        memory once.

        Args:
            rungs: names, dearest first.
            kernels: as `acting_model`.
        """
        models: dict[str, PreTrainedModel] = {}
        sizes: dict[str, PassBytes] = {}
        for rung in rungs:
            model = load_rung(checkpoints / rung, device)
            sizes[rung] = stored_pass_bytes(model, checkpoints / rung)
            models[rung] = sharing(acting_model(model, device, kernels), list(models.values()))
        return cls(models, sizes, device)

    @property
    def route(self) -> tuple[str, ...]:
        """Names of the rungs, dearest first."""
        return tuple(self.models)

    @property
    def dearest(self) -> str:
        return self.route[0]

    @property
    def cheapest(self) -> str:
        return self.route[-1]

    @cached_property
    def spend(self) -> dict[str, float]:
        """Rung -> how far it is from the cheapest rung, 0, to the dearest, 1, in bytes of weights a pass. Its mean over a
        policy's steps is, of two rungs, the high-precision ratio. For more the measure is ours: what budgets are given in. Of one
        rung it is 0: there is nothing to spend.

        Raises:
            UserError: the dearest rung is no larger than the cheapest.
        """
        return spend_by_bytes({rung: self.pass_bytes[rung].weights for rung in self.route})


def spend_by_bytes(sizes: Mapping[str, int]) -> dict[str, float]:
    """As `ActingModels.spend`.

    Args:
        sizes: rung -> bytes of weights a pass, dearest first.
    """
    if len(sizes) == 1:
        return dict.fromkeys(sizes, 0.0)
    (dearest, most), *_, (cheapest, least) = sizes.items()
    if most <= least:
        raise UserError(
            f"precisions.route: {dearest!r} has {most:,} bytes and {cheapest!r} {least:,}, so nothing can be"
            " saved: name a cheaper rung last"
        )
    return {rung: (size - least) / (most - least) for rung, size in sizes.items()}


def acting_model(
    model: PreTrainedModel, device: torch.device, kernels: Literal["low_bit"] | None = None
) -> PreTrainedModel:
    """What computes when a rung acts, made in place.

    Args:
        kernels: `low_bit` has torch's low-bit kernels compute what they can; a model in another dtype than bfloat16, which they
            cannot, is dequantized. Without it, on a CPU the model with plain float layers, and on a GPU as it is.
    """
    if kernels == "low_bit":
        return with_kernels(model)
    return dequantize(model) if device.type == "cpu" else model


def sharing(model: PreTrainedModel, others: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """The model with the others' memory where it has the same weight under the same name, bit by bit. Nothing that acts is
    changed ever after."""
    for other in others:
        theirs = dict(other.named_parameters(remove_duplicate=False))
        for name, mine in model.named_parameters():
            if name in theirs and _equal(mine, theirs[name]):
                mine.data = theirs[name].data
    return model


def _equal(one: Tensor, other: Tensor) -> bool:
    plain = not isinstance(one, QTensor) and not isinstance(other, QTensor)
    return plain and one.dtype == other.dtype and torch.equal(one, other)
