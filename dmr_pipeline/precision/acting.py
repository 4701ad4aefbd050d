"""A rung as it acts."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from dmr_pipeline.precision.quantization import dequantize, load_rung, rung_size


def acting_model(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """What computes when a rung acts: on a CPU the model with plain float layers, made in place: no low-bit kernels there."""
    return dequantize(model) if device.type == "cpu" else model


def load_acting(folder: Path, device: torch.device) -> tuple[PreTrainedModel, int]:
    """What computes when a rung acts, and the bytes of weights that it stands for."""
    model = load_rung(folder, device)
    size = rung_size(model).bytes
    return acting_model(model, device), size
