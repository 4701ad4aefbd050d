"""Checkpoints that are no float causal LM in safetensors: each is named for what it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmr_pipeline.agent.checkpoint import load_causal_lm
from dmr_pipeline.errors import UserError
from tests.helpers.checkpoints import save

CPU = torch.device("cpu")
AS_A_RUNG = r"can be a rung of the same model: precisions\.ladder\[\]\.checkpoint"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, of the package gptqmodel"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq, of the package gptqmodel or autoawq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, of the package bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes, of the package bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors, of the package compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4, of the package kernels"),
        ({"quant_method": "quanto", "weights": "int4"}, "quanto, of the package optimum-quanto"),
        ({"quant_method": "of-tomorrow"}, "of-tomorrow"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_quantized_checkpoints_are_refused_by_method_and_package(
    folder: Path, config: dict[str, object], named: str
) -> None:
    change_config(folder, quantization_config=config)
    with pytest.raises(UserError, match=rf"quantized already \({named}.*dequantize it.*{AS_A_RUNG}") as raised:
        load_causal_lm(folder, None, CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "method"),
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")],
)
def test_files_of_quantizers_tell_too(folder: Path, file: str, method: str) -> None:
    (folder / file).write_text("{}")
    with pytest.raises(UserError, match=rf"quantized already \({method}"):
        load_causal_lm(folder, None, CPU)


@pytest.mark.parametrize(("dtype", "stored"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_in_8_bits_are_refused_whatever_the_config_says(folder: Path, dtype: torch.dtype, stored: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"layers\.0\.mlp\.up_proj\.weight is stored as {stored}"):
        load_causal_lm(folder, None, CPU)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"architectures": ["Qwen3Model"]}, "Qwen3Model"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "type 't5'"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "type 'bart'"),
        ({"model_type": "clip"}, "type 'clip'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_architectures_are_refused_by_name(folder: Path, changes: dict[str, object], kind: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(UserError, match=rf"{kind} is no causal LM with a head") as raised:
        load_causal_lm(folder, None, CPU)
    assert len(str(raised.value)) < 300


def test_gguf_and_single_files_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    with pytest.raises(UserError, match=r"model\.safetensors' is a file: name the folder"):
        load_causal_lm(weights, None, CPU)
    weights.rename(folder / "q4.gguf")
    for source in (folder, folder / "q4.gguf"):
        with pytest.raises(UserError, match=rf"q4\.gguf': GGUF files are not read.*{AS_A_RUNG}"):
            load_causal_lm(source, None, CPU)
