"""The word-level tokenizers of the tiny agents that are trained here."""

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dmr_pipeline.environments.base import SEPARATOR

SPECIAL_TOKENS = ("<pad>", "<unk>", "<obs>", "<task>", "<act>", "<do>", "<end>", "<low>", "<high>")
"""`<low>` and `<high>` are the router's: an agent never writes them."""

_SILENT = r"[.,:\[\]()!=\-]|\b(?:a|an|and|you|the|see|it|is|this|with value)\b"
"""Punctuation and words that carry nothing here; leaving them out makes transcripts a third shorter."""

_JOINER = "￭"
"""On the side of a mark where no blank is: '￭,' (joiner annotation, as in OpenNMT's Tokenizer)."""
_BLANK = "▁"
"""A blank that follows another one."""
_PAGE_SEPARATOR = SEPARATOR.strip().lower()
"""A token as it is, brackets and all."""
_IN_SEPARATOR = _PAGE_SEPARATOR.strip("[]")
_BRACKETS = {"[": rf"\[(?!{_IN_SEPARATOR}\])", "]": rf"(?<!\[{_IN_SEPARATOR})\]"}
_FINAL_MARKS = ",:;.!?"
"""Split off at the end of a word alone: '$7.99' and '5:1' are words."""


def word_tokenizer(texts: Iterable[str], numbers: int = 60) -> PreTrainedTokenizerFast:
    """One token a word, over the words of `texts` and the numbers 0 to `numbers`; anything else is `<unk>`.

    It knows neither punctuation nor some words that carry nothing: for benchmarks whose commands are plain words.
    """
    normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(_SILENT), " ")])
    splitter = pre_tokenizers.WhitespaceSplit()
    words = _words(texts, normalizer, splitter)
    vocabulary = [*SPECIAL_TOKENS, *(str(n) for n in range(numbers + 1)), *sorted(w for w in words if not w.isdigit())]
    return _tokenizer(vocabulary, normalizer, splitter)


def exact_word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word or mark, over those of `texts`; anything else is `<unk>`. What was encoded is decoded to the letter.

    Brackets, and marks at the end of a word, are tokens of their own, so that a value is the same tokens in a command, in a
    sentence and on a page. Lost are case, blanks at both ends, the difference between a blank, a tab and a new line, and the
    two signs that are used here, `_JOINER` and `_BLANK`, where a text has them itself.
    """
    rewrites = [(r"[\t\r\n]", " "), (r"(?<= ) ", f"{_BLANK} ")]
    end = rf"(?=[{_FINAL_MARKS}\]]*(?: |$))"
    rewrites += [(f"(?<=[^ ]){re.escape(mark)}{end}", f" {_JOINER}{mark}") for mark in _FINAL_MARKS]
    rewrites += [(f"(?<=[^ ]){bracket}", f" {_JOINER}{mark}") for mark, bracket in _BRACKETS.items()]
    rewrites += [(f"{bracket}(?=[^ ])", f"{mark}{_JOINER} ") for mark, bracket in _BRACKETS.items()]
    normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Strip(),
            *(normalizers.Replace(Regex(pattern), text) for pattern, text in rewrites),
        ]
    )
    splitter = pre_tokenizers.Split(" ", "removed")
    marks = {f"{left}{mark}{right}" for mark in _BRACKETS for left in ("", _JOINER) for right in ("", _JOINER)}
    marks |= {f"{left}{mark}" for mark in _FINAL_MARKS for left in ("", _JOINER)}
    words = _words(texts, normalizer, splitter) | marks | {_BLANK, _PAGE_SEPARATOR}
    decoder = decoders.Sequence(
        [
            # Blanks between tokens, but before those that begin with the joiner, which goes.
            decoders.WordPiece(prefix=_JOINER, cleanup=False),
            decoders.Fuse(),
            decoders.Replace(f"{_JOINER} ", ""),
            decoders.Replace(f"{_BLANK} ", " "),
        ]
    )
    return _tokenizer([*SPECIAL_TOKENS, *sorted(words)], normalizer, splitter, decoder)


def _words(texts: Iterable[str], normalizer: normalizers.Normalizer, splitter: pre_tokenizers.PreTokenizer) -> set[str]:
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    return words - set(SPECIAL_TOKENS)


def _tokenizer(
    vocabulary: list[str],
    normalizer: normalizers.Normalizer,
    splitter: pre_tokenizers.PreTokenizer,
    decoder: decoders.Decoder | None = None,
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<pad>", "<unk>")],
        clean_up_tokenization_spaces=False,
    )
