"""Small tokenizers of the kinds that LLMs bring, trained here on a few texts."""

import json
from functools import cache
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dmr_pipeline.environments.alfworld.words import alfworld_texts

Kind = Literal["qwen", "llama", "gemma", "gpt2", "sentencepiece"]

_QWEN_WORDS = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
"""Which characters byte-level tokens of Qwen and Llama 3 may join."""
_TEXTS = [
    *alfworld_texts(),
    "Instruction: [SEP] find me a red mug, and price lower than 20.00 dollars [SEP] search[red mug] click[buy now]",
    "Thought: I look for a mug.\nAction: go to desk 1\nObservation: On the desk 1, you see a mug 2.\n\n> look\n",
    "<p>go</p>\n\n<p>look</p>\n\n<p>search</p>\n\n" * 20,
    "".join(map(chr, range(32, 127))),
]


@cache
def chat_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the markers of Qwen 3, Llama 3 or GPT-2; BPE of whole words with Gemma's; or a SentencePiece-like
    one with Llama 2's, whose texts begin with a blank."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind in ("gemma", "sentencepiece")))
    if kind in ("qwen", "llama", "gpt2"):
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        words = [] if kind == "gpt2" else [pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        if kind == "gemma":
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(blanks if kind == "gemma" else [*blanks, decoders.Strip(" ", left=1)])
        alphabet = []
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if not alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=bytes_, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    if bytes_:  # ordinary tokens, as in SentencePiece: a text with the letters of one does not become it
        tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))
    marks: dict[Kind, tuple[list[str], str | None, str]] = {
        "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
        "llama": (
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            "<|begin_of_text|>",
            "<|eot_id|>",
        ),
        "gemma": (["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
        "gpt2": (["<|endoftext|>"], None, "<|endoftext|>"),
        "sentencepiece": (["<s>", "</s>"], "<s>", "</s>"),
    }
    special, bos, eos = marks[kind]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in special])
    if kind == "qwen":
        tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=[mark for mark in special if mark not in (bos, eos)],
        clean_up_tokenization_spaces=False,
    )
