"""The pictures of the architecture, drawn from the code: the layers of the package as import-linter enforces them, and the graph
of the stages.

python docs/architecture.py
"""

import ast
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.pipeline import STAGES

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "dmr_pipeline"
WIDTH = 680
INK, MUTED, PLAIN, EDGE = "#1f2933", "#52606d", "#eef2f7", "#fbe3d1"
OUTSIDE = {"dagster": "Dagster", "dvc": "DVC", "great_expectations": "Great Expectations", "ray": "Ray"}
"""Module -> the name of what only the edges may import."""


def layers() -> list[list[str]]:
    """Of the first contract of import-linter, from the top down; the names of one layer do not import each other."""
    settings = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def imported(module: str) -> list[str]:
    """Those of `OUTSIDE` that a module or package imports itself."""
    files = sorted((PACKAGE / module).rglob("*.py")) or [PACKAGE / f"{module}.py"]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
                found.add(node.module.partition(".")[0])
    return [shown for name, shown in OUTSIDE.items() if name in found]


def rooms() -> dict[frozenset[str], str]:
    """Modules -> what lives there, as CONTRIBUTING tells it."""
    page = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("**Rooms**")[2].partition("\n\n**")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {frozenset(re.findall(r"`(\w+)(?:/|\.py)`", names)): text.replace("`", "") for names, text in rows}


def draw_layers() -> str:
    height, gap = 22, 8
    lines: list[str] = []
    y, described = 34.0, rooms()
    for layer in layers():
        x, row = 34.0, 0
        for name in layer:
            width = len(name) * 6.3 + 14
            if x + width > WIDTH - 8:
                x, y = 34.0, y + height + 4
            lines += _box(x, y, width, height, EDGE if imported(name) else PLAIN)
            lines.append(_text(x + width / 2, y + 15, name, 11, anchor="middle", mono=True))
            x += width + gap
        found = [names for names in described if names & set(layer)]
        texts = [described.pop(names) for names in found]
        if len(found) > 1:
            told = [", ".join(name for name in layer if name in names) for names in found]
            texts = [f"{names}: {text}" for names, text in zip(told, texts, strict=True)]
        wide = x < WIDTH - 250
        for text in texts:
            for line in textwrap.wrap(text, int((WIDTH - x - 8) / 5.4) if wide else 110):
                lines.append(_text(x if wide else 36, y + 15 + 14 * row + (0 if wide else height), line, 10.5, MUTED))
                row += 1
        y += max(height, 14 * row + 6) + gap if wide else height + 14 * row + gap
    edges = {name: imported(name) for layer in layers() for name in layer}
    edges_said = ", ".join(f"{name} ({', '.join(libraries)})" for name, libraries in edges.items() if libraries)
    head = [
        _text(8, 18, "Imports point down; names in one row do not import each other.", 11, MUTED),
        f'<path d="M 16 30 V {y - gap}" stroke="{MUTED}" stroke-width="1.5" marker-end="url(#end)"/>',
        *_box(34, y + 4, 14, 14, EDGE),
        _text(54, y + 15, f"the edges: {edges_said}", 10.5, MUTED),
    ]
    return _svg(
        y + 28,
        "The layers of dmr_pipeline, from the command line at the top to small helpers at the bottom",
        [*head, *lines],
    )


def direct_inputs(stage: Stage, stages: Sequence[Stage]) -> list[str]:
    """Inputs that no other input of the stage depends on: with these the graph has the same order."""
    above = {one.name: set(one.inputs) for one in stages}
    for name in TopologicalSorter(above).static_order():
        above[name] = above[name].union(*(above[other] for other in above[name]))
    return [name for name in stage.inputs if not any(name in above[other] for other in stage.inputs)]


def rows(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Each stage just above the first that reads it, or in the last row; the table's order within a row."""
    height: dict[str, int] = {}
    for stage in reversed(stages):
        readers = [height[other.name] for other in stages if stage.name in other.inputs]
        height[stage.name] = 1 + max(readers) if readers else 0
    return [[stage for stage in stages if height[stage.name] == level] for level in range(max(height.values()), -1, -1)]


def draw_stages(stages: Sequence[Stage]) -> str:
    width, gap, y = 316, 26, 8.0
    boxes: dict[str, tuple[float, float, float]] = {}
    lines: list[str] = []
    for row in rows(stages):
        texts = {stage.name: list(_lines_of(stage, stages)) for stage in row}
        height = 26 + 14 * max(map(len, texts.values()))
        for column, stage in enumerate(row):
            x = 8 + column * (width + 32)
            boxes[stage.name] = (x, y, y + height)
            lines += _box(x, y, width, height, PLAIN)
            lines.append(_text(x + 10, y + 17, stage.name, 12.5, mono=True))
            for i, (text, colour) in enumerate(texts[stage.name]):
                lines.append(_text(x + 10, y + 33 + 14 * i, text, 11, colour))
        y += height + gap
    for stage in stages:
        x, top, _ = boxes[stage.name]
        for name in direct_inputs(stage, stages):
            start, _, bottom = boxes[name]
            path = f"M {start + 60} {bottom} V {bottom + gap / 2} H {x + 60} V {top - 3}"
            lines.append(f'<path d="{path}" fill="none" stroke="{MUTED}" stroke-width="1.5" marker-end="url(#end)"/>')
    return _svg(y - gap + 8, "The stages of the pipeline, an arrow from each to those that read what it made", lines)


def _lines_of(stage: Stage, stages: Sequence[Stage]) -> Iterator[tuple[str, str]]:
    """What stands in a stage's box, each line with its colour."""
    others = [name for name in stage.inputs if name not in direct_inputs(stage, stages)]
    for text in textwrap.wrap(stage.description, 54):
        yield text, INK
    if others:
        for text in textwrap.wrap(f"reads also {', '.join(others)}", 54):
            yield text, MUTED


def _box(x: float, y: float, width: float, height: float, colour: str) -> list[str]:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return [f'<rect {place} rx="4" fill="{colour}" stroke="#9aa5b1"/>']


def _text(
    x: float, y: float, text: str, size: float, colour: str = INK, anchor: str = "start", mono: bool = False
) -> str:
    family = "ui-monospace, monospace" if mono else "system-ui, sans-serif"
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-family="{family}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _svg(height: float, title: str, lines: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}"'
    arrow = f'<path d="M 0 0 L 8 4 L 0 8 z" fill="{MUTED}"/>'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" {size} role="img">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="end" markerWidth="8" markerHeight="8" refX="5" refY="4" orient="auto" markerUnits="userSpaceOnUse">',
        f"{arrow}</marker></defs>",
        f'<rect {size} fill="white"/>',
    ]
    return "\n".join([*head, *filter(None, lines), "</svg>", ""])


def pictures() -> dict[Path, str]:
    return {
        DOCS / "development" / "layers.svg": draw_layers(),
        DOCS / "concepts" / "stages.svg": draw_stages(STAGES),
    }


if __name__ == "__main__":
    for path, content in pictures().items():
        path.write_text(content, encoding="utf-8")
        sys.stdout.write(f"{path}\n")
