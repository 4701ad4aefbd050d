"""Causal LMs from and to folders: safetensors only, never a pickle, never code that a checkpoint brings along."""

import copy
import json
import re
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dmr_pipeline.agent.logits import check_causal_lm
from dmr_pipeline.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The torch device; `auto` is CUDA where there is a GPU.

    Raises:
        UserError: `cuda` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: 'cuda' was asked for, but torch sees no GPU here; use 'auto' or 'cpu'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def float_dtype(device: torch.device) -> torch.dtype:
    """What the float rung computes in: float32 on a CPU, bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_causal_lm(
    source: str | Path, revision: str | None, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in evaluation mode and in `float_dtype(device)`, and its tokenizer.

    Args:
        source: folder with config, tokenizer and safetensors weights; or a hub id, with its commit hash as `revision`.

    Raises:
        UserError: no such folder, weights only as a pickle, a hub id without a commit hash, unusable files, or a model that
            cannot act (`check_causal_lm`).
    """
    if Path(source).is_dir():
        refuse_pickles(Path(source))
    elif revision is None or not _COMMIT.fullmatch(revision):
        raise UserError(
            f"model {str(source)!r}: no such folder; if it is a hub id, give its full commit hash as 'revision'"
        )
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(f"model {str(source)!r}: type {config.model_type!r} is no causal LM; choose one that is")
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=float_dtype(device),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"model {str(source)!r} cannot be loaded: {' '.join(str(error).split())}") from error
    unusable = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if unusable:
        raise UserError(f"model {str(source)!r}: weights missing or of a wrong shape: {', '.join(unusable[:3])}, ...")
    model = model.to(device).eval()
    check_causal_lm(model)
    return model, tokenizer


def save_causal_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Write config, safetensors weights cast to `dtype`, and tokenizer; equal models give equal bytes."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    drop_versions(folder)


def refuse_pickles(folder: Path) -> None:
    """Raise a UserError if the folder has no safetensors weights; it says so where there are pickled ones instead."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"model folder {folder}: {pickles[0]} is a pickle, which can run code when it is read;"
            " convert the weights to safetensors (save_pretrained)"
        )
    raise UserError(f"model folder {folder}: there are no safetensors weights (*.safetensors) in it")


def drop_versions(folder: Path) -> None:
    """Take the library's version out of the configs, so that the files' hashes stay when only the library changes."""
    for path in sorted(folder.glob("*config.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("transformers_version", None)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder of files, without any model beside it.

    Raises:
        UserError: the folder is missing or holds no tokenizer.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {folder} cannot be loaded: {' '.join(str(error).split())}") from error
    return tokenizer
