"""The text of a recipe file: plain YAML within bounds, read as DVC reads it (YAML 1.2, so that 1e-3 is a number).

What is refused: other encodings than UTF-8, keys that are there twice, tags, and whatever would take memory or time out of
proportion to a recipe.
"""

import functools
import re
import reprlib
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from dmr_pipeline.errors import UserError, printable

_MOST_BYTES = 100_000
_DEEPEST = 20
"""Levels of nesting; a recipe has five."""
_MOST_ALIASES = 50
"""References to anchors: with many, a short text stands for an endless one."""
_LONGEST = 300
_ENDLESS_NUMBER = re.compile(r"[-+.]*[0-9][0-9a-fA-F._xX]{50}")
"""Python turns thousands of digits into no integer."""


def short(text: object) -> str:
    """What a file says, or an error says of it, as a part of one line."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def shown(value: object) -> str:
    """A value from a file in a few characters."""
    return printable(reprlib.repr(value))


def read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping that a file holds, not validated. Not to be changed: who reads the same text again is given the same one.

    Raises:
        UserError: the file cannot be read or holds anything else; the message is one line that names the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file; a recipe is a YAML file")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: is larger than {_MOST_BYTES:,} bytes, which no recipe is")
    try:
        found = _parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}): save it in that encoding") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise UserError(f"{path}: not valid YAML: {where}{short(error.problem or error)}") from error
    except (YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise UserError(f"{path}: not valid YAML: {short(' '.join(str(error).split()))}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {type(found).__name__}")
    return found


@functools.lru_cache(maxsize=16)  # each step of a run reads its recipe, and several times
def _parse(text: str) -> object:
    """What plain YAML says.

    Raises:
        YAMLError: it is no YAML.
        ValueError: it is no plain YAML, or out of proportion.
    """
    # In pure Python, which reads nested text without recursion here; what it recurses over below is bounded.
    depth = aliases = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        line = event.start_mark.line + 1
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        aliases += isinstance(event, AliasEvent)
        if depth > _DEEPEST:
            raise ValueError(f"line {line}: more than {_DEEPEST} levels of nesting")
        if aliases > _MOST_ALIASES:
            raise ValueError(f"line {line}: more than {_MOST_ALIASES} references to anchors")
        if isinstance(event, CollectionStartEvent | ScalarEvent) and event.tag is not None:
            raise ValueError(f"line {line}: a recipe has no tags, but there is {event.tag}")
        if isinstance(event, ScalarEvent) and event.style is None and _ENDLESS_NUMBER.match(event.value):
            raise ValueError(f"line {line}: a number of {len(event.value):,} characters")
    return YAML(typ="safe", pure=True).load(text)
