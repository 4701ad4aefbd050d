"""Causal LMs from and to folders: safetensors only, never a pickle, never code that a checkpoint brings along."""

import copy
import json
import logging
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError is of its HTTP client, whichever that is
    HTTPError,
    StrictDataclassError,
    XetDownloadError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dmr_pipeline.agent.formats import (
    refuse_architecture,
    refuse_file,
    refuse_low_bits,
    refuse_pickles,
    refuse_quantized,
    stored_dtype,
)
from dmr_pipeline.agent.logits import alike, check_causal_lm, some_tokens
from dmr_pipeline.errors import UserError
from dmr_pipeline.model_cache import named_folder
from dmr_pipeline.pretrained import ADAPTER_CONFIG, adapter_config, base_revision

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_REASON = 300
"""Characters of another library's message that are shown."""


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


def random_causal_lm(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A model of random weights, the same at every call on a device, in the dtype that a checkpoint is loaded in there."""
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=float_dtype(device))
    return model.eval()


def float_dtype(device: torch.device, wanted: Literal["float32", "bfloat16"] | None = None) -> torch.dtype:
    """What the float rung computes in: as `agent.dtype` has it, or float32 on a CPU, bfloat16 on a GPU."""
    if wanted is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if wanted == "bfloat16" and device.type == "cpu":
        _warn_of_slow_bfloat16()
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


@cache
def _warn_of_slow_bfloat16() -> None:
    """Once a process, where this CPU has no instructions for it. Others than x86 are not judged."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        log.warning(
            "agent.dtype: bfloat16 is slow on this CPU, which has neither AMX nor AVX512-BF16; float32 is quicker"
        )


def load_causal_lm(
    source: str | Path,
    revision: str | None,
    device: torch.device,
    *,
    stored_precision: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode, and its tokenizer. An adapter is merged into its base.

    Args:
        source: name of a model of the cache; folder with config, tokenizer and safetensors weights, or with a PEFT adapter; or a
            hub id of either.
        revision: commit hash of a hub id; where the source is the folder of an adapter, that of its base.
        stored_precision: keep the dtype of the files, for a copy.
        dtype: of the model, where that of the files is not kept; `float_dtype(device)` by default.

    Raises:
        UserError: no such folder, a hub id without a commit hash, weights that are pickled or quantized, no causal LM,
            tokens without embeddings, unusable files, or a model that cannot act (`check_causal_lm`).
    """
    name, folder = str(source), local_folder(source, revision)
    wanted = None if stored_precision else dtype or float_dtype(device)
    adapter = adapter_config(folder)
    if adapter is not None:
        pinned = base_revision(source, revision, adapter)
        return _load_merged(name, folder, adapter.base_model_name_or_path, pinned, device, wanted)
    refuse_pickles(folder)
    refuse_low_bits(name, folder)
    with unusable_files(f"model {name!r}"):
        refuse_architecture(name, AutoConfig.from_pretrained(folder, trust_remote_code=False))
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=wanted or stored_dtype(folder),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    unusable = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if unusable:
        raise UserError(f"model {name!r}: weights missing or of a wrong shape: {', '.join(unusable[:3])}, ...")
    tokenizer = load_tokenizer(folder)
    _refuse_tokens_without_embeddings(name, model, tokenizer)
    model = model.to(device).eval()
    check_causal_lm(model)
    return model, tokenizer


def _load_merged(
    name: str, folder: Path, base: str | None, revision: str | None, device: torch.device, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base with the adapter's weights added, in float32 where they were trained in fewer bits.

    Args:
        dtype: of the merged model; without it that of the base's files.
    """
    from peft import PeftModel

    if base is None:
        raise UserError(
            f"adapter {name!r}: {ADAPTER_CONFIG} names no base: write its folder as base_model_name_or_path"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        found = "a pickle (adapter_model.bin)" if (folder / "adapter_model.bin").is_file() else "missing"
        raise UserError(f"adapter {name!r}: its weights are {found}; save them as adapter_model.safetensors")
    here = named_folder(base) or Path(base)
    if not here.is_dir() and (revision is None or not _COMMIT.fullmatch(revision)):
        raise UserError(
            f"adapter {name!r}: its base {base!r} is no folder here; if it is a hub id, give the base's full commit hash as"
            f" 'revision' in {folder / ADAPTER_CONFIG}, or in the recipe beside the adapter's folder"
        )
    if here.is_dir() and adapter_config(here) is not None:
        raise UserError(f"adapter {name!r}: its base {base} is an adapter too; merge that one first")
    model, tokenizer = load_causal_lm(base, revision, torch.device("cpu"))
    kept = dtype or stored_dtype(local_folder(base, revision))
    if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = load_tokenizer(folder)
        _refuse_tokens_without_embeddings(name, model, tokenizer)
    with unusable_files(f"adapter {name!r}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's on tied embeddings, which the comparison below judges
        warnings.filterwarnings("error", message="Found missing adapter keys")
        tokens = some_tokens(model, 12)
        adapted = PeftModel.from_pretrained(model.eval(), folder)
        config = adapted.active_peft_config
        if config.is_prompt_learning or config.task_type not in (None, "CAUSAL_LM"):
            kind = f"{config.peft_type.value} for {config.task_type}"
            raise UserError(f"adapter {name!r}: {kind} cannot be merged into a causal LM")
        with torch.no_grad():
            adapted_logits = adapted(input_ids=tokens, use_cache=False).logits
            model = adapted.merge_and_unload(safe_merge=True)
            merged_logits = model(input_ids=tokens, use_cache=False).logits
    if not alike(merged_logits, adapted_logits, model.dtype):
        raise UserError(
            f"adapter {name!r}: merged into its base it computes something else, as where one of two tied embeddings is"
            " adapted; untie them (tie_word_embeddings), merge and save it, and name that folder"
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kept)
    return model.to(device).eval(), tokenizer


def local_folder(
    source: str | Path,
    revision: str | None,
    check: Callable[[str, Path], object] = refuse_quantized,
    weights: bool = True,
) -> Path:
    """The folder of a checkpoint; of a model that is known by name that in the cache of models; of a hub id that in the hub's
    cache, once nothing in its configs speaks against it.

    Args:
        check: is given the source's name and the folder, when its JSON files are there and again when all are; raises a
            UserError where they are not wanted.
        weights: false leaves them on the hub.
    """
    name, folder = str(source), named_folder(source) or Path(source)
    if folder.is_dir():
        check(name, folder)
        return folder
    refuse_file(folder)
    if revision is None or not _COMMIT.fullmatch(revision):
        raise UserError(
            f"model {name!r}: no such folder; if it is a hub id, give its full commit hash as 'revision' (names that are neither:"
            " `dmr models list`)"
        )
    with unusable_files(f"model {name!r}"):
        texts = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
        for wanted in (["*.json"], [*texts, "*.safetensors"] if weights else texts):
            # Repositories hold the same weights in other formats too, in folders or as consolidated.safetensors.
            ignored = ["*/*", "consolidated*"]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=ignored))
            check(name, folder)
    return folder


@contextmanager
def unusable_files(what: str) -> Iterator[None]:
    """What transformers, peft and the hub raise of files that they cannot use, as a UserError; there is no common class."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (
        OSError, ValueError, ImportError, LookupError, ArithmeticError, AttributeError, TypeError, RuntimeError, UserWarning,
        SafetensorError, StrictDataclassError, HTTPError, XetDownloadError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise UserError(f"{what} cannot be loaded: {type(error).__name__}: {reason[:_LONGEST_REASON]}") from error


def _refuse_tokens_without_embeddings(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= rows:
        raise UserError(
            f"model {name!r}: token {token!r} has number {number}, but there are embeddings of {rows} tokens only: resize"
            " and train them (resize_token_embeddings), or take the added tokens out of the tokenizer"
        )


def save_causal_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Write config, safetensors weights cast to `dtype`, and tokenizer; equal models give equal bytes."""
    saved = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    drop_versions(folder)


def rung_config(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of the model's config for a checkpoint without a generation config, which alone knows all tokens that end the
    model's texts."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.eos_token_id = model.generation_config.eos_token_id if model.generation_config else config.eos_token_id
    return config


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
    with unusable_files(f"tokenizer {folder}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    files = set(tokenizer.vocab_files_names.values())
    if files and not any(
        (folder / file).is_file() for file in files
    ):  # transformers makes an empty one of a config alone
        raise UserError(f"tokenizer {folder} cannot be loaded: there is no {' or '.join(sorted(files))}")
    return tokenizer
