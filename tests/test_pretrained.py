import json
from pathlib import Path

import pytest

from dmr_pipeline.errors import UserError
from dmr_pipeline.pretrained import pretrained_folders


def test_an_adapter_is_made_up_of_its_folder_and_its_bases(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    base.mkdir()
    config = adapter / "adapter_config.json"
    assert pretrained_folders(str(adapter)) == [adapter]
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)}))
    assert pretrained_folders(adapter) == [adapter, base]
    config.write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-1.7B", "revision": "0" * 40}))
    assert pretrained_folders(adapter) == [adapter], "a hub id has no folder here"
    assert pretrained_folders("Qwen/Qwen3-1.7B") == []


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"base_model_name_or_path": 5}'])
def test_an_unreadable_adapter_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_config\.json: not the config of an adapter"):
        pretrained_folders(tmp_path)
