"""Nouns of a title, by which WebShop tells whether a bought product is of the kind that was asked for."""

import re
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

from dmr_pipeline.errors import UserError

NounTagger = Literal["spacy", "alphabetic"]
"""spacy: tokens that en_core_web_sm tags NOUN or PROPN, as in WebShop. alphabetic: all words of letters, where spaCy's model is
not installed."""
DESCRIPTIONS: dict[NounTagger, str] = {
    "spacy": "spaCy's en_core_web_sm, as in WebShop",
    "alphabetic": "every word of letters, where WebShop takes what spaCy tags as a noun",
}
_MODEL = "en_core_web_sm"


def installed_tagger() -> NounTagger:
    """spaCy where its model is installed."""
    return "spacy" if find_spec(_MODEL) else "alphabetic"


def nouns(tagger: NounTagger) -> Callable[[str], list[str]]:
    """
    Returns:
        A function from a title to its nouns, lower-cased, repeats among them.

    Raises:
        UserError: spaCy's model is asked for and not installed.
    """
    return _alphabetic if tagger == "alphabetic" else _spacy()


def _alphabetic(title: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[^\W\d_]+", title)]


@lru_cache(maxsize=1)
def _spacy() -> Callable[[str], list[str]]:
    if find_spec(_MODEL) is None:
        raise UserError(
            f"titles' nouns were to come from spaCy's {_MODEL}, which is not installed: run `pip install spacy` and"
            f" `python -m spacy download {_MODEL}`, or set benchmark.nouns to alphabetic in the recipe"
        )
    import spacy

    model = spacy.load(_MODEL, disable=["parser", "ner", "lemmatizer"])
    return lru_cache(maxsize=100_000)(
        lambda title: [token.text.lower() for token in model(title) if token.pos_ in ("NOUN", "PROPN")]
    )
