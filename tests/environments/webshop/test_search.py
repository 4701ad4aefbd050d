"""Search against BM25 written out, with Lucene's byte for a document's length, and against Lucene's analysis by hand."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr_pipeline.environments.webshop.search import SearchIndex, build_index, lossy_length, terms

COUNT = 5


def int_to_byte4(number: int) -> int:
    """Lucene's SmallFloat.intToByte4: 24 numbers as they are, then floats of four significant bits."""
    if number < 24:
        return number
    number -= 24
    shift = max(0, number.bit_length() - 4)
    return 24 + (number if number < 8 else (number >> shift) & 7 | (shift + 1) << 3)


def byte4_to_int(byte: int) -> int:
    if byte < 24:
        return byte
    mantissa, shift = (byte - 24) & 7, ((byte - 24) >> 3) - 1
    return 24 + (mantissa if shift < 0 else (mantissa | 8) << shift)


@given(st.integers(0, 2**31 - 1))
def test_a_length_is_kept_as_lucene_keeps_it(length: int) -> None:
    assert 0 <= int_to_byte4(length) < 256
    assert lossy_length(length) == byte4_to_int(int_to_byte4(length))


def test_short_lengths_are_exact() -> None:
    assert [lossy_length(length) for length in (0, 1, 39, 40, 41, 42, 43, 1000)] == [0, 1, 39, 40, 40, 42, 42, 984]


def scores(corpus: list[str], query: str) -> list[float]:
    """BM25 with k1 0.9 and b 0.4, without the factor k1 + 1."""
    split = [document.split() for document in corpus]
    average = sum(map(len, split)) / len(split)
    total = [0.0] * len(split)
    for term in query.split():
        having = sum(term in words for words in split)
        idf = math.log(1 + (len(split) - having + 0.5) / (having + 0.5))
        for i, words in enumerate(split):
            length = byte4_to_int(int_to_byte4(len(words)))
            total[i] += idf * words.count(term) / (words.count(term) + 0.9 * (0.6 + 0.4 * length / average))
    return total


def indexed(corpus: list[str], folder: Path) -> SearchIndex:
    build_index(corpus, folder)
    return SearchIndex.load(folder)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(2, 60))
def test_the_best_documents_are_found(tmp_path_factory: pytest.TempPathFactory, seed: int, documents: int) -> None:
    rng = random.Random(seed)
    words = ["mug", "lamp", "sofa", "rug", "vase", "zinc"]
    corpus = [" ".join(rng.choices(words, [30, 20, 10, 5, 2, 1], k=rng.randint(1, 60))) for _ in range(documents)]
    index = indexed(corpus, tmp_path_factory.mktemp("index"))
    for _ in range(5):
        query = " ".join(rng.choices([*words, "nowhere"], k=rng.randint(1, 5)))
        expected = scores(corpus, query)
        found = index.search(query, COUNT)
        assert len(found) == min(COUNT, sum(score > 0 for score in expected))
        assert len(set(found)) == len(found)
        # Equal but for single precision, in which scores are stored: what is found scores as the best do, place by place.
        best = sorted(expected, reverse=True)[: len(found)]
        assert [expected[i] for i in found] == pytest.approx(best, rel=1e-5)


def test_equal_scores_come_in_order_of_documents_lossy_lengths_included(tmp_path: Path) -> None:
    """42 and 43 words count as 42; 41 do not."""
    filler = ["x"] * 42
    corpus = [" ".join(["mug", *filler[:n]]) for n in (42, 41, 40, 41)]
    assert indexed(corpus, tmp_path).search("mug", 4) == (2, 0, 1, 3)
    assert indexed(corpus, tmp_path / "again").search("mug", 3) == (2, 0, 1)


def test_nothing_is_found_for_unknown_and_empty_words(tmp_path: Path) -> None:
    index = indexed(["mug", "lamp"], tmp_path)
    assert [index.search(words, 5) for words in ("", "the", "sofa", "!")] == [()] * 4
    assert len(index) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Women's running-shoes, and men’s", "women run shoe men"),
        ("relational conditional rational hopping hoping", "relat condit ration hop hope"),
        ("caresses ponies ties flies sky happy", "caress poni ti fli sky happi"),
        ("triplicate formative electriciti hopefulness", "triplic form electr hope"),
        ("probate rate cease controll roll", "probat rate ceas control roll"),
        # The two rules that Porter's program has and his paper has not.
        ("possibly technology technological biology", "possibl technolog technolog biologi"),
        ("3.5mm 1,000 12-pack a_b don't wi-fi", "3.5mm 1,000 12 pack a_b don't wi fi"),
        ("it is not for sale — ½ & ™", "sale"),
        ("Café 中文", "café 中 文"),
    ],
)
def test_terms_are_those_of_lucenes_english_analysis(text: str, expected: str) -> None:
    """Stems are the examples of Porter (1980)."""
    assert terms(text) == expected.split()


def test_an_installed_jax_is_kept_off_the_gpu(tmp_path: Path) -> None:
    """bm25s starts JAX when it is imported, and JAX takes most of a GPU's memory at once."""
    jax = tmp_path / "jax"
    jax.mkdir()
    (jax / "__init__.py").touch()
    (jax / "lax.py").write_text("import os\nprint(os.environ['JAX_PLATFORMS'])\ndef top_k(scores, k): ...\n")
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", "import dmr_pipeline.environments.webshop.search"],
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "cpu\n"
