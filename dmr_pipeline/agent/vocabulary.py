"""The word-level tokenizer of the tiny agents that are trained here."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<unk>", "<obs>", "<task>", "<act>", "<do>", "<end>", "<low>", "<high>")
"""`<low>` and `<high>` are the router's: an agent never writes them."""

_SILENT = r"[.,:\[\]()!=\-]|\b(?:a|an|and|you|the|see|it|is|this|with value)\b"
"""Punctuation and words that carry nothing here; leaving them out makes transcripts a third shorter."""


def word_tokenizer(texts: Iterable[str], numbers: int = 60) -> PreTrainedTokenizerFast:
    """One token a word, over the words of `texts` and the numbers 0 to `numbers`; anything else is `<unk>`."""
    normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(_SILENT), " ")])
    splitter = pre_tokenizers.WhitespaceSplit()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    words -= set(SPECIAL_TOKENS)
    vocabulary = [*SPECIAL_TOKENS, *(str(n) for n in range(numbers + 1)), *sorted(w for w in words if not w.isdigit())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<pad>", "<unk>")],
        clean_up_tokenization_spaces=False,
    )
