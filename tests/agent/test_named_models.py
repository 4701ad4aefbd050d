"""Models that recipes and adapters name, from a cache that is anywhere."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dmr_pipeline.agent.checkpoint import load_causal_lm, local_folder
from dmr_pipeline.errors import UserError
from dmr_pipeline.model_cache import KNOWN, cache_folder, fetched_names, identity
from dmr_pipeline.pretrained import pretrained_hashes
from tests.helpers.checkpoints import save
from tests.helpers.named_models import NAME, Stand, make_stand, put_into_cache, use_stand

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made_stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return make_stand(tmp_path_factory.mktemp("index"))


@pytest.fixture
def stand(made_stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    use_stand(made_stand, tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return made_stand


def write_adapter(folder: Path, base: str) -> None:
    """One that does something, of the base's folder, which is then called otherwise."""
    model, _ = load_causal_lm(base, None, CPU)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))


def test_a_recipe_and_an_adapter_name_a_fetched_model(stand: Stand, tmp_path: Path) -> None:
    put_into_cache(stand, tmp_path / "cache")
    model = save(tmp_path / "cache" / NAME)
    tokens = torch.arange(10)[None]
    loaded, tokenizer = load_causal_lm(NAME, None, CPU)
    assert loaded.num_parameters() == model.num_parameters()
    assert tokenizer.encode("go to shelf") == [1, 2, 3]
    write_adapter(tmp_path / "adapter", NAME)
    merged, _ = load_causal_lm(tmp_path / "adapter", None, CPU)
    assert not torch.allclose(merged(tokens).logits, loaded(tokens).logits, atol=1e-3)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"model '{NAME}' is not on this machine: dmr models fetch {NAME} gets it$"):
        load_causal_lm(NAME, None, CPU)
    with pytest.raises(UserError, match=f"dmr models fetch {NAME} gets it$"):
        load_causal_lm(tmp_path / "adapter", None, CPU)


def test_the_provenance_is_the_files_hash_wherever_the_model_is(stand: Stand, tmp_path: Path) -> None:
    wanted = {NAME: f"gguf {stand.model.gguf_sha256}, conversion 1"}
    assert pretrained_hashes(NAME) == wanted, "not fetched"
    put_into_cache(stand, tmp_path / "cache")
    assert pretrained_hashes(NAME) == wanted
    save(tmp_path / "cache" / NAME)
    write_adapter(tmp_path / "adapter", NAME)
    assert pretrained_hashes("adapter").keys() == {"adapter", NAME}
    assert pretrained_hashes("adapter")[NAME] == wanted[NAME]


def test_a_folder_of_that_name_is_meant_by_a_path(stand: Stand, tmp_path: Path) -> None:
    put_into_cache(stand, tmp_path / "cache")
    (tmp_path / NAME).mkdir()
    assert local_folder(NAME, None) == cache_folder() / NAME
    assert local_folder(f"./{NAME}", None) == Path(NAME)
    assert local_folder(Path(NAME), None) == Path(NAME)
    assert identity(Path(NAME)) is None


def test_what_is_no_model_is_not_listed(stand: Stand, tmp_path: Path) -> None:
    assert fetched_names() == []
    put_into_cache(stand, tmp_path / "cache")
    (tmp_path / "cache" / "other").mkdir()
    (tmp_path / "cache" / "broken").mkdir()
    (tmp_path / "cache" / "broken" / "source.json").write_text("{")
    (tmp_path / "cache" / "file").touch()
    assert fetched_names() == [NAME]
    assert identity("other") is None
    assert identity("Qwen/Qwen3-1.7B") is None


def test_the_cache_is_the_users_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DMR_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dmr-pipeline" / "models"


def test_known_models_are_pinned_and_free() -> None:
    for name, model in KNOWN.items():
        assert model.name == name
        assert len(model.wheel_sha256) == len(model.gguf_sha256) == 64
        assert model.licence == "apache-2.0"
        assert model.needed_bytes > 0
