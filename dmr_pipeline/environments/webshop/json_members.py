"""JSON files larger than memory: a list or an object, member by member."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

LONGEST_MEMBER = 1 << 24
"""Characters. What is bad in so much text is bad JSON, and not only cut."""
_SPACE = re.compile(r"[ \t\n\r]*")
_CLOSING = {"[": "]", "{": "}"}
# An integer has any number of digits here, of which Python's own refuses more than 4,300.
_DECODER = json.JSONDecoder(parse_int=float)


def read_members(blocks: Iterable[str], opening: Literal["[", "{"]) -> Iterator[Any]:
    """The elements of a JSON list, or the (name, value) pairs of a JSON object. Numbers are floats; NaN and Infinity are, too.

    Args:
        blocks: the text, cut anywhere.
        opening: the bracket that the text must begin with.

    Raises:
        ValueError: the text is no JSON, or of another kind; the message names the character, from 0.
    """
    blocks = iter(blocks)
    text, before, place = "", 0, 0  # `before` characters of the whole lie before `text`, of which `place` are done
    expect = _opening
    while True:
        try:
            member, end, following = expect(text, place, opening)
        except (json.JSONDecodeError, RecursionError) as error:
            more = _read(blocks, len(text) - place) if len(text) - place < LONGEST_MEMBER else ""
            if not more:
                raise ValueError(_problem(error, before + place, before)) from error
            text, before, place = text[place:] + more, before + place, 0
            continue
        ...
