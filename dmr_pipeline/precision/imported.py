"""Rungs that somebody quantized elsewhere: GPTQ and AWQ checkpoints and GGUF files of the agent's own model.

The model is the agent's: its architecture and its config, the file's weights. They act dequantized, as there are no kernels
here for these formats, and cost what the file stores. The rung's folder holds copies of the files as they were.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dmr_pipeline.agent.checkpoint import drop_versions, local_folder, rung_config, unusable_files
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.gguf_file import gguf_bytes, gguf_config, gguf_vocabulary, load_gguf, open_gguf
from dmr_pipeline.precision.imported_bytes import IMPORTED_FILE, ImportedBytes
from dmr_pipeline.precision.packed_folder import (
    fill,
    packed_bytes,
    packed_config,
    packed_vocabulary,
    read_layout,
    source_files,
)
from dmr_pipeline.recipe.model import Pretrained
from dmr_pipeline.recipe.precisions import Rung

log = logging.getLogger(__name__)

_SOURCE = "source"
_GGUF = "model.gguf"
_SAME = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
"""Of a config, what must be the agent's; shapes alone do not tell heads."""
_COUNTS_AS = {1: 2, 5: 4, 6: 8}
"""Bits of GGUF's types that are no rung of their own -> the rung that they count as."""
_OTHER_MODEL, _OTHER_TRAINING = 0.7, 0.02
"""Norm of the embeddings' difference from the agent's, as a share of these, from which on they are of another model (those of
two models that have nothing in common differ by 1 at least, the coarsest quantization is below 0.7), and from which on, where
they are stored in float, they were trained since: rounding to 16 bits is below 0.005. Both ours."""


class Inspected(NamedTuple):
    """A checkpoint that is of the agent's model, as far as can be told without its weights."""

    path: Path
    config: PreTrainedConfig
    """The agent's, untied where the checkpoint has a head of its own."""
    stored: ImportedBytes


def inspect(float_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rung: Rung) -> Inspected:
    """Check an imported rung against the agent's float model, before any weight is read.

    Raises:
        UserError: no such file or folder, a format that is not read here, a file that is cut, another model's architecture,
            shapes, vocabulary or tokenizer, or other bits than the rung's.
    """
    assert rung.checkpoint is not None
    what = f"rung {rung.name!r}: {rung.checkpoint.model}"
    path = _located(what, rung.checkpoint)
    with unusable_files(what), _named(what):
        if path.is_file():
            reader: GGUFReader = open_gguf(path)
            theirs, vocabulary = gguf_config(path), gguf_vocabulary(reader)
            _refuse_another_architecture(theirs, float_model.config)
            bits, stored = gguf_bytes(reader, float_model)
        else:
            layout = read_layout(path)
            theirs, vocabulary, bits = packed_config(path), packed_vocabulary(path), layout.bits
            _refuse_another_architecture(theirs, float_model.config)
            stored = packed_bytes(path, layout, float_model)
        counts_as = f"int{_COUNTS_AS.get(bits, bits)}"
        if rung.weights != counts_as:
            raise UserError(f"it stores {bits} bits a weight ({stored.format}): say `weights: {counts_as}`")
        if vocabulary is not None:
            _refuse_another_tokenizer(vocabulary, tokenizer.get_vocab())
    config = rung_config(float_model)
    config.tie_word_embeddings = config.tie_word_embeddings and stored.tied
    return Inspected(path, config, stored)


def import_rung(
    float_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rung: Rung, folder: Path
) -> PreTrainedModel:
    """Copy the rung's checkpoint into the folder and load it, dequantized, in the float model's dtype.

    Raises:
        UserError: as `inspect`; or the embeddings are those of another model.
    """
    path, config, stored = inspect(float_model, tokenizer, rung)
    assert rung.checkpoint is not None
    what = f"rung {rung.name!r}: {rung.checkpoint.model}"
    model = _load(what, path, config, float_model.device)
    _compare_embeddings(what, model, float_model, stored)
    (folder / _SOURCE).mkdir(parents=True)
    for file in [path] if path.is_file() else source_files(path):
        shutil.copyfile(file, folder / _SOURCE / (_GGUF if path.is_file() else file.name))
    config.save_pretrained(folder)
    drop_versions(folder)
    (folder / IMPORTED_FILE).write_text(stored.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return model


def load_imported(folder: Path, device: torch.device) -> PreTrainedModel:
    """Read what `import_rung` wrote, in evaluation mode; the same tensors, bit by bit.

    Raises:
        UserError: a file is missing or damaged.
    """
    what = f"rung {folder}"
    with unusable_files(what):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    source = folder / _SOURCE
    return _load(what, source / _GGUF if (source / _GGUF).is_file() else source, config, device)


def _load(what: str, path: Path, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    with unusable_files(what), _named(what), torch.random.fork_rng():  # the initial weights are drawn, then overwritten
        if path.is_file():
            return load_gguf(path, config, device).eval()
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=config.dtype, trust_remote_code=False
            )
        fill(model, path, read_layout(path))
    return model.eval()


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Whose problem it is, before each."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _located(what: str, checkpoint: Pretrained) -> Path:
    """The GGUF file, or the folder; of a hub id that in the hub's cache."""
    path = Path(checkpoint.model)
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise UserError(f"{what}: no such file")
        if path.suffix != ".gguf":
            raise UserError(f"{what} is a file, but not a .gguf: name the folder that has config.json and the weights")
        return path

    def check(_: str, folder: Path) -> None:
        with _named(what):
            read_layout(folder)

    return local_folder(path, checkpoint.revision, check)


def _refuse_another_architecture(theirs: PreTrainedConfig, ours: PreTrainedConfig) -> None:
    one, other = theirs.get_text_config().to_dict(), ours.get_text_config().to_dict()
    for key in _SAME:
        if key in one and key in other and one[key] != other[key]:
            raise UserError(f"its {key} is {one[key]}, the agent's {other[key]}: it was made from another model")


def _refuse_another_tokenizer(theirs: Mapping[str, int], ours: Mapping[str, int]) -> None:
    """Raise a UserError if a number means another token. Numbers that only one of them knows do not count."""
    numbers = {number: token for token, number in theirs.items()}
    others = [token for token, number in ours.items() if numbers.get(number, token) != token]
    if others:
        raise UserError(
            f"its tokenizer is not the agent's: {len(others)} of {len(ours)} tokens differ, such as number"
            f" {ours[others[0]]}, {numbers[ours[others[0]]]!r} there and {others[0]!r} here"
        )


def _compare_embeddings(what: str, model: PreTrainedModel, float_model: PreTrainedModel, stored: ImportedBytes) -> None:
    """Raise a UserError if the embeddings are another model's; warn where they were trained since. Other tensors do not tell:
    AWQ moves scales from layer to layer, and GPTQ's integers differ more from the agent's weights than a fine-tune's."""
    ours = float_model.get_input_embeddings().weight.detach().float()
    theirs = model.get_input_embeddings().weight.detach().float()
    difference = float((theirs - ours).norm() / ours.norm())
    if not difference < _OTHER_MODEL:
        raise UserError(
            f"{what}: its embeddings differ from the agent's by {difference:.0%} of their norm: it was made from another model"
        )
    if difference > _OTHER_TRAINING and 8 * stored.embedding >= 16 * ours.numel():
        log.warning(
            "%s: its embeddings differ from the agent's by %.1f%% of their norm: was it made from another training of the"
            " model? Its KL to the float model will tell",
            what,
            100 * difference,
        )
