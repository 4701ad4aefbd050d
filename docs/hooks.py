"""What mkdocs does beside rendering docs/: pages that lie elsewhere in the repository, links out of docs/, and the reference of
recipes and commands, made from the code."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, is_typeddict

import typer
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from dmr_pipeline import benchmarks
from dmr_pipeline.cli import app
from dmr_pipeline.evaluation import results
from dmr_pipeline.pipeline import STAGES
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.benchmark import Games
from dmr_pipeline.recipe.fields import Section

REPOSITORY = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "development/contributing.md",
    "CHANGELOG.md": "development/changes.md",
    "deploy/README.md": "how-to/deploy-files.md",
}
"""File of the repository -> page of the site."""
BOOST = {"how-to/troubleshooting": 14.0, "how-to/own-": 12.0, "how-to/": 4.0, "tutorial/": 2.0, "reference/": 0.25}
"""How a page's name begins -> what it counts in the search, the first that fits: the reference has all words, and seldom the
answer; who pastes a message wants its explanation, and not the page that has most of its words."""
SOURCES = {page: file for file, page in ELSEWHERE.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    boost = next((boost for start, boost in BOOST.items() if page.file.src_uri.startswith(start)), 1.0)
    page.meta.setdefault("search", {"boost": boost})
    text = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", lambda link: _link(link, page.file.src_uri, files), markdown)
    text = text.replace("<!-- keys of a recipe -->", "\n".join(recipe_lines()))
    text = text.replace("<!-- types of metrics.json -->", "\n".join(metrics_lines()))
    text = text.replace("<!-- stages of the pipeline -->", "\n".join(stage_lines()))
    return text.replace("<!-- commands of dmr -->", commands())


def _link(link: re.Match[str], page: str, files: Files) -> str:
    """A link as it has to be on the site; what it leads to out of docs/, in the checkout, is named without one."""
    picture, text, target = link.groups()
    if re.match(r"[a-z]+:|#", target):
        return link.group()
    path, hash_sign, anchor = target.partition("#")
    source = SOURCES.get(page, f"docs/{page}")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    on_site = ELSEWHERE.get(file, file.removeprefix("docs/"))
    if files.get_file_from_path(on_site) is None and not file.startswith("docs/"):
        return text if text.strip("`") in file else f"{text} (`{file}`)"
    relative = posixpath.relpath(on_site, posixpath.dirname(page) or ".")
    return f"{picture}[{text}]({relative}{hash_sign}{anchor})"


def commands() -> str:
    """All commands with arguments and options, by Typer's own generator."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="dmr", indent=1, title="dmr")
    # Its lists of subcommands cut their descriptions off, and each subcommand has a heading and all of it below.
    return re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", text)


def metrics_lines() -> Iterator[str]:
    """A directive of mkdocstrings for each type, the whole before its parts."""
    for name, kind in reversed(vars(results).items()):
        if is_typeddict(kind) and kind.__module__ == results.__name__:
            yield f"::: {results.__name__}.{name}"


def stage_lines() -> Iterator[str]:
    """A heading for each stage, and below it what the table of the pipeline says."""
    for stage in STAGES:
        needs = stage.resources
        facts = {
            "reads": ", ".join(f"[{name}](#{name})" for name in stage.inputs) or "nothing",
            "recipe sections": ", ".join(f"[{name}](recipe.md#{name})" for name in stage.sections),
            "asks for": f"{needs.cpus} CPUs, {needs.gpus} GPUs, {needs.memory_gb} GB of memory",
            "code version": stage.code_version,
        }
        yield from ("", f"## {stage.name}", "", stage.description, "", stage.reading, "", "| | |", "| --- | --- |")
        yield from (f"| {name} | {fact} |" for name, fact in facts.items())


def recipe_lines() -> Iterator[str]:
    """A heading and a table of keys for each section, and for the sections within it."""
    for name, field in Recipe.model_fields.items():
        if name != "name":
            yield from _section_lines(name, *_sections(field.annotation))
    for name in benchmarks.names():
        section: type[Section] = benchmarks.find(name).section
        fields = section.model_fields.items()
        own = {key: field for key, field in fields if field.description and field != Games.model_fields.get(key)}
        yield from ("", f"## benchmark of {name}", "", _first_sentence(section), "", *_table("benchmark", own))


def _section_lines(path: str, *sections: type[Section]) -> Iterator[str]:
    for section in sections:
        level = "#" * min(4, 2 + path.count("."))
        yield from ("", f"{level} {path}", "", _first_sentence(section), "", *_table(path, section.model_fields))
        for name, field in section.model_fields.items():
            yield from _section_lines(f"{path}.{name}", *_sections(field.annotation))


def _table(path: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in fields.items():
        sections = _sections(field.annotation)
        meaning = field.description or " ".join(map(_first_sentence, sections))
        anchor = f"{path}.{name}".replace(".", "")
        written = f"[{_written(field)}](#{anchor})" if sections else _written(field)
        cells = (f"`{name}`", written, _default(field), meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "its keys' defaults"
    return "none" if field.default is None else f"`{_plain(field.default)}`"


def _plain(value: object) -> str:
    """As YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, tuple) else str(value)


def _written(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, sign in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        if name in dir(bound)
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{_plain(value)}`" for value in arguments)
    if origin is tuple:
        return "list of " + _type(arguments[0])
    if origin is dict:
        return f"{_type(arguments[0])} -> {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}[annotation]


def _sections(annotation: object) -> list[type[Section]]:
    """Those that a key may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _first_sentence(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").partition("\n\n")[0].split())
