"""Recipe files: found, read, and held to the rules, with a line for each problem."""

import logging
import re
import reprlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from dmr_pipeline.errors import UserError, printable
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.across import problems_across
from dmr_pipeline.recipe.fields import Section
from dmr_pipeline.recipe.precisions import AUTO, NAMED
from dmr_pipeline.recipe.text import read_mapping, short, shown

log = logging.getLogger(__name__)

RECIPE_FOLDER = Path("recipes")
NAME_RULE = "small letters, digits, '.', '_' and '-', a letter or digit first, at most 100, and no number"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_LIKE_A_NUMBER = re.compile(r"[0-9][0-9_.]*(?:e[0-9]+)?|0[box][0-9a-f_]+")
"""YAML would read such a name as a number, and DVC then look for another recipe."""
_TAKEN = frozenset({"incoming", "official", "scratch"})
"""Folders of `data/` beside those of the recipes."""


def is_recipe_name(name: str) -> bool:
    """Does a recipe or its file's stem go by the rule? What does is safe as part of a path, a command and a YAML text."""
    return bool(_NAME.fullmatch(name)) and not _LIKE_A_NUMBER.fullmatch(name) and name not in _TAKEN


def load_recipe(name: str, folder: Path = RECIPE_FOLDER) -> Recipe:
    """Read `<folder>/<name>.yaml`.

    Raises:
        UserError: there is no such recipe, or it is malformed; the message names the file, the key and what to do. Where
            there is more than one problem it names the first, and the command that shows all.
    """
    recipe, problems = check_recipe(name, folder)
    if recipe is None:
        more = len(problems) - 1
        rest = f" (and {more} more: `dmr recipe check {name}` shows all)" if more else ""
        raise UserError(problems[0] + rest)
    return recipe


def check_recipe(name: str, folder: Path = RECIPE_FOLDER) -> tuple[Recipe | None, list[str]]:
    """The recipe, or None and everything that is wrong with it: a line each, of file, key, what to do and what is there."""
    if not is_recipe_name(name):
        known = ", ".join(recipe_names(folder)) or "none"
        return None, [f"{shown(name)} can be no recipe's name: {NAME_RULE} (known recipes: {known})"]
    path = folder / f"{name}.yaml"
    if not path.exists() and not path.is_symlink():
        known = ", ".join(recipe_names(folder)) or "none"
        return None, [f"unknown recipe {name!r}: there is no {path} (known recipes: {known})"]
    try:
        content = {"name": name, **read_mapping(path)}
    except UserError as error:
        return None, [str(error)]
    if content["name"] != name:
        return None, [f"{path}: its name is {shown(content['name'])}, but the file is called {name!r}"]
    recipe, errors = None, list[ErrorDetails]()
    try:
        recipe = Recipe.model_validate(content)
        sections: dict[str, Section] = dict(recipe)
    except ValidationError as error:
        sections, errors = _read_sections(content, error)
    problems = [line for e in errors for line in _lines(e)] + list(problems_across(sections))
    return (None if problems else recipe), [f"{path}: {problem}" for problem in problems]


def _read_sections(content: Mapping[str, Any], error: ValidationError) -> tuple[dict[str, Section], list[ErrorDetails]]:
    """The sections that are right, each by itself, and everything that is wrong with the others and with the whole."""
    readers = _section_readers()
    sections: dict[str, Section] = {}
    # Of the whole: sections that are missing, keys that are none. What is misspelt explains what is missing: it comes first.
    errors = [e for e in error.errors() if not e["loc"] or e["loc"][0] not in readers.keys() & content.keys()]
    for name in readers.keys() & content.keys():
        try:
            sections[name] = readers[name].validate_python(content[name])
        except ValidationError as found:
            errors += [{**e, "loc": (name, *e["loc"])} for e in found.errors()]
    rank = {name: place for place, name in enumerate(Recipe.model_fields)}
    errors.sort(key=lambda e: (e["type"] != "extra_forbidden", rank.get(str(e["loc"][0]) if e["loc"] else "", -1)))
    return sections, errors


@cache
def _section_readers() -> dict[str, TypeAdapter[Section]]:
    hints = get_type_hints(Recipe, include_extras=True)
    return {name: TypeAdapter(hints[name]) for name in Recipe.model_fields if name != "name"}


def _lines(error: ErrorDetails) -> Iterator[str]:
    """One a problem; the path is that of the YAML text."""
    loc = [part for part in error["loc"] if part not in (AUTO, NAMED)]
    if error["type"] == "problems":
        for field, text in error["ctx"]["problems"]:
            yield f"{'.'.join([*map(_key, loc), *([field] if field else [])])}: {short(text)}"
        return
    if error["type"] == "unknown_benchmark":
        said = error["ctx"]
        others = "or what an installed package brings"
        yield f"benchmark.environment: Input should be one of {said['known']}, {others} (it is {shown(said['name'])})"
        return
    given = "" if error["type"] in ("missing", "extra_forbidden") else f" (it is {shown(error['input'])})"
    yield f"{'.'.join(map(_key, loc)) or 'recipe'}: {short(error['msg'])}{given}"


def _key(part: int | str) -> str:
    return short(reprlib.repr(part) if not isinstance(part, str) else part[:60])


def recipe_names(folder: Path = RECIPE_FOLDER) -> list[str]:
    """Names of all recipes, sorted. Other files called *.yaml are passed over, with a warning that names them."""
    names = []
    for path in folder.glob("*.yaml"):
        if is_recipe_name(path.stem) and path.is_file():
            names.append(path.stem)
        else:
            _warn_of(path)
    return sorted(names)


@cache
def _warn_of(path: Path) -> None:
    """Once, since commands list the recipes many times."""
    why = "is no file" if is_recipe_name(path.stem) else f"is not called as a recipe may be ({NAME_RULE})"
    log.warning("%s is passed over: it %s", printable(path), why)
