import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from dmr_pipeline import pipeline, pretrained
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import MANIFEST, verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.artifacts.provenance import provenance
from dmr_pipeline.errors import UserError
from dmr_pipeline.pretrained import content_hash, pretrained_hashes
from dmr_pipeline.recipe import Recipe


def test_an_adapter_is_made_up_of_its_folder_and_its_bases(project: Recipe) -> None:
    adapter, base = Path("adapter"), Path("base")
    adapter.mkdir()
    base.mkdir()
    config = adapter / "adapter_config.json"
    assert pretrained_hashes("adapter") == {"adapter": content_hash(adapter)}
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    assert pretrained_hashes(adapter) == {"adapter": content_hash(adapter), "base": content_hash(base)}
    config.write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-1.7B", "revision": "0" * 40}))
    assert pretrained_hashes(adapter).keys() == {"adapter"}, "a hub id has no folder here"
    assert pretrained_hashes("Qwen/Qwen3-1.7B") == {}
    assert pretrained_hashes(str(config)) == {str(config): content_hash(config)}, "a file is a model of its own"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"base_model_name_or_path": 5}'])
def test_an_unreadable_adapter_config_is_named(project: Recipe, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_config\.json: not the config of an adapter"):
        pretrained_hashes(tmp_path)


def test_new_weights_in_the_same_folder_make_what_is_read_from_it_stale(project: Recipe) -> None:
    folder = Path("models/tiny")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    agent = pipeline.find_stage("agent", pipeline.STAGES)
    materialize_stage(pipeline.STAGES[0], project)
    assert not materialize_stage(agent, project).skipped
    assert materialize_stage(agent, project).skipped
    before = (folder / "model.safetensors").stat().st_mtime_ns
    (folder / "model.safetensors").write_text("WEIGHTS")
    os.utime(folder / "model.safetensors", ns=(before + 1, before + 1))
    assert verify(artifact_folder("agent", "fake")).manifest.pretrained == {"models/tiny": content_of("weights")}
    assert not materialize_stage(agent, project).skipped
    assert verify(artifact_folder("agent", "fake")).manifest.pretrained == {"models/tiny": content_of("WEIGHTS")}
    shutil.rmtree(folder)
    assert materialize_stage(agent, project).skipped, "a machine without the folder takes what is there"


@pytest.mark.parametrize("name", ["agent", "kl_router"])
def test_the_folders_content_is_in_the_provenance_of_the_stage_that_reads_it(project: Recipe, name: str) -> None:
    stage = pipeline.find_stage(name, pipeline.STAGES)
    without = provenance(stage, project, {})
    assert without.pretrained == {}
    Path("models/tiny").mkdir(parents=True)
    Path("models/tiny/model.safetensors").write_text("weights")
    assert provenance(stage, project, {}).pretrained == {"models/tiny": content_of("weights")}
    readers = [stage.name for stage in pipeline.STAGES if provenance(stage, project, {}).pretrained]
    assert readers == ["agent", "kl_router", "grpo_router"]


def test_a_manifest_without_a_pretrained_folder_is_as_it_was(project: Recipe) -> None:
    artifact = materialize_stage(pipeline.STAGES[0], project).artifact
    assert "pretrained" not in json.loads((artifact.path / MANIFEST).read_text())


def test_a_file_is_hashed_again_only_where_its_size_or_time_changed(project: Recipe, monkeypatch) -> None:
    read: list[Path] = []
    original = pretrained.file_md5
    monkeypatch.setattr(pretrained, "file_md5", lambda path: (read.append(path), original(path))[1])
    folder = Path("model")
    (folder / ".git").mkdir(parents=True)
    for name in ("a", "b", ".git/hidden"):
        (folder / name).write_text(name)
    first = content_hash(folder)
    assert [path.name for path in read] == ["a", "b"]
    assert content_hash(folder) == first
    assert len(read) == 2
    (folder / "b").rename(folder / "c")
    assert content_hash(folder) != first
    pretrained.MEMORY.write_text('{"x": [1')
    (folder / "c").rename(folder / "b")
    assert content_hash(folder) == first


def test_the_hash_of_a_file_is_of_its_content(project: Recipe) -> None:
    file = Path("models/q4.gguf")
    file.parent.mkdir()
    file.write_text("weights")
    Path("models/other").write_text("not read")
    first = content_hash(file)
    assert first == hashlib.md5(json.dumps({"q4.gguf": hashlib.md5(b"weights").hexdigest()}).encode()).hexdigest()
    before = file.stat().st_mtime_ns
    file.write_text("WEIGHTS")
    os.utime(file, ns=(before + 1, before + 1))
    assert content_hash(file) != first


def test_two_processes_that_hash_at_the_same_time_do_not_meet(project: Recipe, monkeypatch) -> None:
    for name in ("mine", "theirs"):
        Path(name).mkdir()
        Path(name, "weights").write_text(name)
    replace, others = Path.replace, list[int]()

    def late_replace(self: Path, target: Path) -> Path:
        if not others:
            others.append(os.fork())
            if others[0] == 0:
                os._exit(0 if content_hash(Path("theirs")) else 1)
            assert os.waitpid(others[0], 0)[1] == 0
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", late_replace)
    content_hash(Path("mine"))
    assert len(others) == 1
    assert not list(pretrained.MEMORY.parent.glob("*.part"))


def content_of(weights: str) -> str:
    md5 = hashlib.md5(weights.encode()).hexdigest()
    return hashlib.md5(json.dumps({"model.safetensors": md5}).encode()).hexdigest()
