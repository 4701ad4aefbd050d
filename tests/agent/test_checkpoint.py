import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from dmr_pipeline.agent.checkpoint import load_causal_lm, resolve_device, save_causal_lm
from dmr_pipeline.errors import UserError

CPU = torch.device("cpu")


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<unk>": 0, "go": 1, "to": 2, "shelf": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def save(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model = tiny_model()
    save_causal_lm(model, word_tokenizer(), folder, dtype)
    return model


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
    with pytest.raises(UserError, match="cannot be loaded"):
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
