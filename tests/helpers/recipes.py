"""Committed recipes with changes, and texts and names that no recipe may have."""

from typing import Any

import yaml

from dmr_pipeline.recipe.reading import RECIPE_FOLDER
from tests.helpers.fake_project import RECIPE_YAML, REPOSITORY

LEFT_OUT = object()


def content(base: str, changes: dict[str, object]) -> dict[str, Any]:
    """A committed recipe with other values at dotted paths; a number in a path is an index. Where the verdict chooses the route,
    the recipe's pair is its route, so that there is something to change."""
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / RECIPE_FOLDER / f"{base}.yaml").read_text())
    if found["precisions"]["route"] == "auto":
        found["precisions"]["route"] = high, low = found["precisions"].pop("pair")
        shares = {"all-high": {high: 1}, "all-low": {low: 1}, "mixed": {high: 0.5, low: 0.5}}
        found["trajectories"] = {"behaviour": [{"name": name, "shares": share} for name, share in shares.items()]}
    for path, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        at: Any = found
        for parent in parents:
            at = at.setdefault(parent, {}) if isinstance(at, dict) else at[parent]
        if value is LEFT_OUT:
            del at[last]
        elif last == "+":
            at.append(value)
        else:
            at[last] = value
    return found


def laughs(first: str, following: str) -> bytes:
    """Each line stands for nine times the one before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + following % ", ".join([f"*a{i - 1}"] * 9) for i in range(1, 9)]
    return "\n".join(lines).encode()


TEXTS: list[tuple[str, bytes, str]] = [
    ("utf-16", RECIPE_YAML.encode("utf-16"), "is not UTF-8 text (byte 0)"),
    ("latin-1", b"# caf\xe9\n" + RECIPE_YAML.encode(), "is not UTF-8 text (byte 5)"),
    ("random", bytes(range(255, -1, -1)), "is not UTF-8 text (byte 0)"),
    ("nul", b"benchmark: \x00",
     "not valid YAML: unacceptable character #x0000: special characters are not allowed in \""),
    ("escape", b"benchmark: \x1b[31m", "not valid YAML: unacceptable character #x001b"),
    ("empty", b"", "a recipe is a mapping of sections, this is NoneType"),
    ("text", b"recipe", "a recipe is a mapping of sections, this is str"),
    ("list", b"- a", "a recipe is a mapping of sections, this is list"),
    ("two", b"a: 1\n---\nb: 2\n", "not valid YAML: line 2, column 1: but found another document"),
    ("open", b"a: [1, 2", "not valid YAML: line 1, column 9: expected ',' or ']'"),
    ("tab", b"a:\n\t- b", "not valid YAML: line 2, column 1: found character"),
    ("twice", RECIPE_YAML.encode() + b"release: {}\n",
     "not valid YAML: line 25, column 1: found duplicate key \"release\""),
    ("twice-within", b"a: {b: 1, b: 2}", "not valid YAML: line 1, column 11: found duplicate key \"b\""),
    ("deep", b"a: " + b"[" * 50_000, "not valid YAML: line 1: more than 20 levels of nesting"),
    ("deep-blocks", b"".join(b" " * i + b"a:\n" for i in range(300)), "not valid YAML: line 21: more than 20 levels"),
    ("digits", b"a: " + b"9" * 5000, "not valid YAML: line 1: a number of 5,000 characters"),
    ("hex-digits", b"a: 0x" + b"f" * 5000, "not valid YAML: line 1: a number of 5,002 characters"),
    ("date", b"a: 2024-13-45", "not valid YAML: month must be in 1..12"),
    ("python", b"a: !!python/object/apply:os.system [ls]",
     "not valid YAML: line 1: a recipe has no tags, but there is "),
    ("tag", b"a: !!int x", "not valid YAML: line 1: a recipe has no tags"),
    ("bool-tag", b"a: !!bool x", "not valid YAML: line 1: a recipe has no tags"),
    ("timestamp-tag", b"a: !!timestamp x", "not valid YAML: line 1: a recipe has no tags"),
    ("binary", b"a: !!binary AAAA", "not valid YAML: line 1: a recipe has no tags"),
    ("alias", b"a: *b", "not valid YAML: line 1, column 4: found undefined alias 'b'"),
    ("key", b"? {a: b}\n: 1", "not valid YAML: line 1, column 3: found unhashable key"),
    ("laughs", laughs("[x]", "[%s]"), "not valid YAML: line 7: more than 50 references to anchors"),
    ("merged-laughs", laughs("{x: 1}", "{<<: [%s]}"), "not valid YAML: line 7: more than 50 references to anchors"),
    ("large", b"# " + b"x" * 100_000, "is larger than 100,000 bytes"),
]  # fmt: skip
BAD_NAMES = [
    "", ".", "..", "../x", "x/y", "/etc/passwd", "X", "-x", ".x", "_x", "x y", "x;ls", "$(ls)", "`ls`", "x\n", "x\0", "é",
    "a" * 101, "a" * 5000, "\x1b[31m", "1e3", "12", "0x1f", "0o17", "1.5", "1_000", "incoming", "official", "scratch",
    "*", "x{y}", "#x",
]  # fmt: skip
