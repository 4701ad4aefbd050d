"""Bytes that a forward pass at batch 1 reads.

Every pass reads all weights but the embeddings, of which it looks up a row a token (the head is read whole, also where it is
tied to an embedding), and the keys and values of the transcript so far. Floats count 16 bits each on every device, and so do
scales and shifts: what a machine computes in does not make a model dearer. Low-bit weights count as they are stored.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dmr_pipeline.agent.logits import decoder_of, some_tokens
from dmr_pipeline.precision.imported_bytes import imported_bytes
from dmr_pipeline.precision.quantization import stored_bytes


@dataclass(frozen=True)
class PassBytes:
    """What one forward pass reads of a model."""

    weights: int
    """Of all weights but the embeddings."""
    embedding_row: int = 0
    """Of the embeddings, for each token that the pass is given."""
    cached_numbers: float = 0
    """Numbers, not bytes, of keys and values in all layers, for each token of the transcript so far. Layers that see a window of
    it only are charged in full."""


def pass_bytes(model: PreTrainedModel) -> PassBytes:
    """Of a model as it is stored: before it is dequantized for acting."""
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    looked_up = [table for table in tables if head is None or table.weight is not head.weight]
    return PassBytes(
        weights=sum(stored_bytes(model).values()) - sum(2 * table.weight.numel() for table in looked_up),
        embedding_row=sum(2 * table.embedding_dim for table in tables),
        cached_numbers=cached_numbers(model),
    )


def stored_pass_bytes(model: PreTrainedModel, folder: Path) -> PassBytes:
    """Of a rung that was loaded from the folder. An imported one, plain float in memory, counts as its files store it."""
    imported, loaded = imported_bytes(folder), pass_bytes(model)
    if imported is None:
        return loaded
    row = imported.embedding // model.get_input_embeddings().num_embeddings
    return PassBytes(imported.layers_and_head, row, loaded.cached_numbers)


@torch.no_grad()
def cached_numbers(model: PreTrainedModel) -> float:
    """Of keys and values in all layers, for a token: measured on a few."""
    count = 8
    output = decoder_of(model)(input_ids=some_tokens(model, count), use_cache=True)
    layers = (output.get("past_key_values") or output["cache_params"]).layers
    kept = (vars(layer).get(name) for layer in layers for name in ("keys", "values"))
    return sum(tensor.numel() for tensor in kept if tensor is not None) / count
