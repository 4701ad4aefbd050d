"""Full-text search as WebShop's: BM25 over Lucene's English analysis (Anserini's defaults, k1 0.9 and b 0.4).

The scores are bm25s' Lucene variant, with each document's length rounded as Lucene keeps it.
"""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

# bm25s starts JAX where it is installed, and JAX would take three quarters of the GPU's memory from the LLM.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import bm25s
import bm25s.scoring
import numpy as np
import regex
import Stemmer

_BOUNDARY = regex.compile(r"(?V1)(?w)\b")
"""Unicode's word boundaries (UAX #29), which Lucene's StandardTokenizer follows."""
_HAS_LETTER = regex.compile(r"[\p{L}\p{Nd}]")
_MEASURED = regex.compile("(?:[aeiou]|(?<=[^aeiou])y)[^aeiou]")
"""A vowel and a consonant: what Porter's rules ask for before a suffix (m > 0)."""
_STOP_WORDS = frozenset(
    (  # noqa: SIM905 - a list would be thirty lines
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
        "this to was will with"
    ).split()
)
"""Lucene's English stop words."""


@lru_cache(maxsize=1_000_000)
def _term(word: str) -> str:
    """Lower-cased and without possessive 's, then stemmed; empty for a stop word, and for what is no word."""
    if not _HAS_LETTER.search(word):
        return ""
    word = word.lower()
    if word.endswith(("'s", "’s")):
        word = word[:-2]
    return "" if word in _STOP_WORDS else _stem(word)


def _stem(word: str) -> str:
    """By Porter's algorithm with the two rules of its second step that Lucene has from his program, not his paper:
    bli -> ble (possibly, possible) and logi -> log (technology, technological)."""
    stem = str(_stemmer().stemWord(word))
    for suffix, instead in (("bli", "ble"), ("logi", "log")):
        if stem.endswith(suffix) and _MEASURED.search(stem.removesuffix(suffix)):
            return str(_stemmer().stemWord(stem.removesuffix(suffix) + instead))
    return stem


@lru_cache(maxsize=1)
def _stemmer() -> Stemmer.Stemmer:
    return Stemmer.Stemmer("porter", 0)


def terms(text: str) -> list[str]:
    """What a text is searched by."""
    return [term for word in _BOUNDARY.split(text) if (term := _term(word))]


def lossy_length(length: int) -> int:
    """As Lucene keeps a length in one byte: exact up to 40, above that its excess over 24 is cut to four significant bits."""
    excess = length - 24
    shift = max(0, excess.bit_length() - 4)
    return length if length <= 40 else 24 + (excess >> shift << shift)


def build_index(documents: Iterable[str], folder: Path) -> None:
    """Index the documents, numbered from 0, and save the index."""
    vocabulary: dict[str, int] = {}
    numbered = [
        np.array([vocabulary.setdefault(term, len(vocabulary)) for term in terms(text)], dtype=np.int32)
        for text in documents
    ]
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    exact = bm25s.scoring._score_tfc_lucene

    def rounded(tf_array: Any, l_d: int, **rest: Any) -> Any:  # noqa: ANN401 - bm25s has no types
        return exact(tf_array, lossy_length(l_d), **rest)

    # bm25s has no way of its own to change what a document's length counts for.
    with patch("bm25s.scoring._score_tfc_lucene", rounded):
        index.index((numbered, vocabulary), show_progress=False)
    index.save(folder)


class SearchIndex:
    """An index, mapped into memory."""

    def __init__(self, index: bm25s.BM25) -> None:
        self._index = index

    @classmethod
    def load(cls, folder: Path) -> "SearchIndex":
        return cls(bm25s.BM25.load(folder, mmap=True, load_vocab=True))

    def __len__(self) -> int:
        return int(self._index.scores["num_docs"])

    def search(self, words: str, count: int) -> tuple[int, ...]:
        """Numbers of the documents that score best, `count` at most, best first and then in order; none that score 0."""
        known = [term for term in terms(words) if term in self._index.vocab_dict]
        if not known:
            return ()
        scores = self._index.get_scores(known)
        found = np.flatnonzero(scores > 0)
        if len(found) > count:
            least = np.partition(scores[found], -count)[-count]
            found = found[scores[found] >= least]
        best = found[np.lexsort((found, -scores[found]))][:count]
        return tuple(int(document) for document in best)
