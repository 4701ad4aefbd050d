"""JSON files larger than memory: a list or an object, member by member."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

LONGEST_MEMBER = 1 << 24
"""Characters of which a member is made at most: what fails in so many is bad, and not merely cut."""
_SPACE = re.compile(r"[ \t\n\r]*")
_CLOSING = {"[": "]", "{": "}"}
# Python's integers refuse more than 4,300 digits; JSON does not.
_DECODER = json.JSONDecoder(parse_int=float)
_T = TypeVar("_T")


def read_members(blocks: Iterable[str], opening: Literal["[", "{"]) -> Iterator[Any]:
    """The elements of a JSON list, or the (name, value) pairs of a JSON object. As Python's `json` does, it takes NaN and
    Infinity for numbers; integers come as floats.

    Args:
        blocks: the text, cut anywhere.
        opening: the bracket that the text must begin with.

    Raises:
        ValueError: the text is not JSON of this kind; the message says at which character, from 0.
    """
    text = _Text(blocks)
    last = text.parse(lambda window, place: _open(window, place, opening))
    while not last:
        member, last = text.parse(lambda window, place: _member(window, place, opening))
        yield member
    text.finish()


class _Text:
    """A window on the text that moves on."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self._blocks = iter(blocks)
        self._window, self._place, self._before = "", 0, 0

    def parse(self, rule: Callable[[str, int], tuple[_T, int]]) -> _T:
        """What the rule finds at the present place, beyond which it goes on."""
        while True:
            try:
                found, self._place = rule(self._window, self._place)
                return found
            except json.JSONDecodeError as error:
                if not self._widen():
                    raise ValueError(f"{error.msg}: character {self._before + error.pos:,}") from error
            except RecursionError as error:
                raise ValueError(f"nested too deeply: character {self._before + self._place:,}") from error

    def finish(self) -> None:
        while True:
            end = _skip(self._window, self._place)
            if end < len(self._window):
                raise ValueError(f"more text after its end: character {self._before + end:,}")
            if not self._widen():
                return

    def _widen(self) -> bool:
        """Read on, at least as much as is pending: what is parsed again then stays in proportion to the whole."""
        pending = self._window[self._place :]
        if len(pending) > LONGEST_MEMBER:
            return False
        parts, length = [pending], 0
        for block in self._blocks:
            parts.append(block)
            length += len(block)
            if length > len(pending):
                break
        self._before += self._place
        self._window, self._place = "".join(parts), 0
        return length > 0


def _open(text: str, place: int, opening: str) -> tuple[bool, int]:
    """Whether it is closed at once."""
    place = _expect(text, _skip(text, place), opening)
    if place == len(text):
        raise json.JSONDecodeError("Expecting value", text, place)
    closed = text[place] == _CLOSING[opening]
    return closed, place + closed


def _member(text: str, place: int, opening: str) -> tuple[tuple[Any, bool], int]:
    """A member, and whether it is the last. It is whole only where something comes after it."""
    place = _skip(text, place)
    if opening == "{":
        start = place
        name, place = _DECODER.raw_decode(text, start)
        if not isinstance(name, str):
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, start)
        place = _skip(text, _expect(text, _skip(text, place), ":"))
    value, place = _DECODER.raw_decode(text, place)
    member = (name, value) if opening == "{" else value
    place = _skip(text, place)
    if text[place : place + 1] == _CLOSING[opening]:
        return (member, True), place + 1
    return (member, False), _expect(text, place, ",")


def _skip(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    assert space is not None
    return space.end()


def _expect(text: str, place: int, character: str) -> int:
    if text[place : place + 1] != character:
        raise json.JSONDecodeError(f"Expecting {character!r}", text, place)
    return place + 1
