import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import httpx2
import pytest
import torch
from huggingface_hub.errors import XetDownloadError
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dmr_pipeline.agent import checkpoint
from dmr_pipeline.agent.checkpoint import float_dtype, load_causal_lm, local_folder, resolve_device, save_causal_lm
from dmr_pipeline.errors import UserError
from tests.helpers.checkpoints import save, tiny_model, word_tokenizer

CPU = torch.device("cpu")


def test_round_trip_keeps_the_weights_and_the_tokens(tmp_path: Path) -> None:
    model = save(tmp_path)
    loaded, tokenizer = load_causal_lm(tmp_path, None, CPU)
    assert not loaded.training
    assert tokenizer.encode("go to shelf sofa") == [1, 2, 3, 0]
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32, "saving must not touch the caller's model"
        torch.testing.assert_close(loaded.state_dict()[name], tensor.bfloat16().float(), rtol=0, atol=0)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    tokens = torch.tensor([[1, 2, 3]])
    for parameter in model.parameters():  # not model.bfloat16(): that would round the rotary frequencies too
        parameter.data = parameter.bfloat16().float()
    expected = model.eval()(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=0)


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "model.safetensors" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "transformers_version" not in json.loads((tmp_path / "one" / "config.json").read_text())


def test_pickles_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors weights"):
        load_causal_lm(tmp_path, None, CPU)
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load_causal_lm(tmp_path, None, CPU)


@pytest.mark.parametrize(
    ("source", "revision"), [("no/such-model", None), ("no/such-model", "main"), ("/no/such", None)]
)
def test_a_hub_id_needs_a_commit_and_a_folder_must_exist(source: str, revision: str | None) -> None:
    with pytest.raises(UserError, match=r"no such folder.*commit hash"):
        load_causal_lm(source, revision, CPU)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be loaded"):
        load_causal_lm(tmp_path, None, CPU)
    save_file({"model.norm.weight": torch.ones(32)}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights missing.*model\.embed_tokens\.weight"):
        load_causal_lm(tmp_path, None, CPU)
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(tmp_path, None, CPU)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "m.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(tmp_path, None, CPU)


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    if torch.cuda.is_available():
        assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    else:
        assert resolve_device("auto") == CPU
        with pytest.raises(UserError, match="no GPU"):
            resolve_device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_copy_keeps_the_dtype_of_the_files_and_its_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    save(tmp_path / "brought", dtype)
    config = tmp_path / "brought" / "config.json"
    config.write_text(config.read_text().replace(str(dtype).removeprefix("torch."), "float32"))  # the files decide
    model, tokenizer = load_causal_lm(tmp_path / "brought", None, CPU, stored_precision=True)
    save_causal_lm(model, tokenizer, tmp_path / "copy", model.dtype)
    brought, copied = (load_file(tmp_path / name / "model.safetensors") for name in ("brought", "copy"))
    assert {tensor.dtype for tensor in copied.values()} == {dtype}
    assert brought.keys() == copied.keys()
    assert all(torch.equal(brought[name], copied[name]) for name in brought)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    acting, _ = load_causal_lm(tmp_path / "copy", None, CPU)
    assert acting.dtype == torch.float32, "on a CPU it acts in float32"


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_it_acts_in_the_dtype_of_the_recipe(tmp_path: Path, wanted: Literal["float32", "bfloat16"]) -> None:
    save(tmp_path, torch.float16)
    model, _ = load_causal_lm(tmp_path, None, CPU, dtype=float_dtype(CPU, wanted))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, wanted)}


def test_bfloat16_on_a_cpu_that_has_no_instructions_for_it_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    for has_instructions, warned in ((True, 0), (False, 1)):
        checkpoint._warn_of_slow_bfloat16.cache_clear()
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda has=has_instructions: has)
        assert float_dtype(CPU, "bfloat16") == float_dtype(CPU, "bfloat16") == torch.bfloat16
        assert float_dtype(CPU, "float32") == float_dtype(CPU) == torch.float32
        assert [message.split(" on")[0] for message in caplog.messages] == ["agent.dtype: bfloat16 is slow"] * warned


def test_tokens_without_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"<new-{i}>" for i in range(17)])  # of numbers 4 to 20, and there are 20 embeddings
    save_causal_lm(tiny_model(), tokenizer, tmp_path, torch.float32)
    with pytest.raises(UserError, match=r"token '<new-16>' has number 20, but there are embeddings of 20 tokens only"):
        load_causal_lm(tmp_path, None, CPU)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"tokenizer .* cannot be loaded: there is no .*tokenizer\.json"):
        load_causal_lm(tmp_path, None, CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -1}, {"hidden_size": "32"}, {"num_key_value_heads": 0}, {"hidden_act": "nope"}, {"dtype": "nope"},
        {"rope_parameters": {"rope_type": "nope"}}, {"layer_types": ["nope"]}, {"model_type": None},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_whatever_transformers_raises_of_a_config_is_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match="cannot be loaded") as raised:
        load_causal_lm(tmp_path, None, CPU)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def adapter(folder: Path, base: Path, config: PeftConfig) -> PreTrainedModel:
    """Save a trained-looking adapter; the model with it, not merged."""
    model, _ = load_causal_lm(base, None, CPU)
    model.name_or_path = str(base)
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.eval().save_pretrained(folder)
    return adapted


def lora(**changes: object) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, **({"target_modules": ["q_proj", "down_proj"]} | changes))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapter_is_merged_into_its_base(tmp_path: Path, changes: dict[str, object]) -> None:
    base, folder, copy = (tmp_path / name for name in ("base", "adapter", "copy"))
    save(base)
    adapted = adapter(folder, base, lora(**changes))
    tokens = torch.arange(10)[None]
    expected = adapted(tokens).logits
    plain, _ = load_causal_lm(base, None, CPU)
    assert not torch.allclose(plain(tokens).logits, expected, atol=1e-2), "an adapter that does nothing shows nothing"
    model, tokenizer = load_causal_lm(folder, None, CPU)
    assert type(model) is type(plain)
    assert tokenizer.encode("go to shelf") == [1, 2, 3]
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)

    model, tokenizer = load_causal_lm(folder, None, CPU, stored_precision=True)
    assert model.dtype == torch.bfloat16, "that of the base"
    save_causal_lm(model, tokenizer, copy, model.dtype)
    torch.testing.assert_close(load_causal_lm(copy, None, CPU)[0](tokens).logits, expected, rtol=0.05, atol=0.05)


def test_an_adapter_of_one_of_two_tied_embeddings_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "base")
    adapter(tmp_path / "adapter", tmp_path / "base", lora(target_modules=["lm_head"]))
    with pytest.raises(UserError, match=r"merged into its base it computes something else"):
        load_causal_lm(tmp_path / "adapter", None, CPU)


def _without_base(folder: Path) -> None:
    shutil.rmtree(folder.parent / "base")


def _of_a_hub_id(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/llm"}))


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _half(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")


def _quantized_base(folder: Path) -> None:
    path = folder.parent / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"load_in_4bit": True}}))


def _nested(folder: Path) -> None:
    shutil.copy(folder / "adapter_config.json", folder.parent / "base")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _without_base,
            r"its base '.*base' is no folder here; .*full commit hash as 'revision' in .*adapter_config\.json",
        ),
        (_of_a_hub_id, r"its base 'some/llm' is no folder here"),
        (_pickled, r"its weights are a pickle \(adapter_model\.bin\)"),
        (_half, r"cannot be loaded: UserWarning: Found missing adapter keys"),
        (_quantized_base, r"base': its weights are quantized already \(bitsandbytes"),
        (_nested, r"its base .* is an adapter too"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    save(tmp_path / "base")
    adapter(tmp_path / "adapter", tmp_path / "base", lora())
    spoil(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        load_causal_lm(tmp_path / "adapter", None, CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "PROMPT_TUNING for CAUSAL_LM cannot be merged",
        ),
        (LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["q_proj"]), "LORA for FEATURE_EXTRACTION cannot"),
    ],
)
def test_adapters_of_other_kinds_are_refused(tmp_path: Path, config: PeftConfig, message: str) -> None:
    save(tmp_path / "base")
    adapter(tmp_path / "adapter", tmp_path / "base", config)
    with pytest.raises(UserError, match=message):
        load_causal_lm(tmp_path / "adapter", None, CPU)


COMMIT = "0123456789abcdef" * 2 + "01234567"


def cached_repository(cache: Path, name: str) -> Path:
    """An empty snapshot of a hub's repository, as the hub's client keeps it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def test_a_hub_id_of_a_model_or_of_a_base_is_loaded_at_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = cached_repository(tmp_path, "some/llm")
    save(base)
    model, _ = load_causal_lm("some/llm", COMMIT, CPU)
    with pytest.raises(UserError, match="model 'some/llm' cannot be loaded"):
        load_causal_lm("some/llm", COMMIT[::-1], CPU)
    adapted = adapter(tmp_path / "adapter", base, lora())
    _of_a_hub_id(tmp_path / "adapter")
    merged, _ = load_causal_lm(tmp_path / "adapter", COMMIT, CPU)
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged(tokens).logits, model(tokens).logits, atol=1e-2)


@pytest.mark.parametrize(
    "error", [httpx2.ProxyError("403 Forbidden"), httpx2.ReadTimeout("cut"), XetDownloadError("cut")]
)
def test_a_network_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def cut(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", cut)
    with pytest.raises(UserError, match=rf"^model 'some/llm'.* cannot be loaded: {type(error).__name__}: {error}$"):
        local_folder("some/llm", "a" * 40)
