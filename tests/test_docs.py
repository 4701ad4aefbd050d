"""README and docs/: what they name exists, and their code says what the package knows."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from dmr_pipeline.cli import app
from dmr_pipeline.evaluation import consequence, play, transcripts
from dmr_pipeline.ingestion.schema import LoggedEpisode
from dmr_pipeline.precision import frontier
from dmr_pipeline.recipe.reading import check_recipe
from dmr_pipeline.rollout import tables as rollout_tables
from dmr_pipeline.router import grpo, labels
from dmr_pipeline.study.design import load_study
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.micro_recipe import RECIPE_YAML
from tests.helpers.pages import PAGES, Block, anchors, blocks, commands, links

DOCS = REPOSITORY / "docs"
ROWS = [
    line
    for line in (DOCS / "what-works.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not re.match(r"\|[ -]+\|[ -]+\|", line) and not line.endswith("| test |")
]
by_name = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES])


@pytest.mark.parametrize("row", ROWS)
def test_each_row_of_what_works_names_a_test_that_exists(row: str) -> None:
    file, _, name = row.split("|")[4].strip().strip("`").partition("::")
    source = (REPOSITORY / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {re.escape(name)}\(", source, re.M), row


def test_there_are_rows() -> None:
    assert len(ROWS) > 0


def test_the_front_page_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


def test_there_are_pages_and_links() -> None:
    assert len(PAGES) > 30
    assert sum(len(links(page)) for page in PAGES) > 80


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@by_name
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    for words in commands(page, "dmr"):
        command = typer.main.get_command(app)
        for word in words[1:]:
            if isinstance(command, TyperGroup) and word in command.commands:
                command = command.commands[word]
            elif word.startswith("-"):
                options = {name for parameter in command.params for name in parameter.opts}
                assert word.partition("=")[0] in options | {"--help"}, words
            else:
                assert not isinstance(command, TyperGroup) or word.isupper(), words


@by_name
def test_targets_are_those_of_the_makefile(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M))
    for _, *words in commands(page, "make"):
        assert {word for word in words if "=" not in word} <= targets, words


def test_commands_are_found() -> None:
    assert ["dmr", "run", "alfworld-tiny"] in commands(DOCS / "tutorial/first-run.md", "dmr")
    assert ["dmr", "materialize", "--force"] in commands(DOCS / "how-to/troubleshooting.md", "dmr")
    assert ["make", "demo"] in commands(REPOSITORY / "README.md", "make")


STUDY = DOCS / "how-to/study.md"


def test_each_package_has_its_room() -> None:
    rooms = (
        (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("**Rooms**")[2].partition("\n\n**")[0]
    )
    packages = {folder.parent.name for folder in (REPOSITORY / "dmr_pipeline").glob("*/__init__.py")}
    assert set(re.findall(r"`(\w+)/`", rooms)) >= packages


def test_each_page_can_be_reached() -> None:
    listed = set(re.findall(r": ([\w/.-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} <= listed


DECISIONS = (DOCS / "development/decisions.md").read_text(encoding="utf-8").split("\n## ")[1:]


def test_there_are_decisions() -> None:
    assert len(DECISIONS) >= 15


@pytest.mark.parametrize("entry", DECISIONS, ids=lambda entry: entry.partition("\n")[0])
def test_each_decision_says_why_and_where(entry: str) -> None:
    assert re.findall(r"^\*\*(.+?)\.\*\*", entry, re.M) == ["Decision", "Why", "Considered", "Lives in"]
    assert len(entry.splitlines()) <= 25
    places = re.findall(r"`([\w./-]+)`", entry.partition("**Lives in.**")[2])
    assert places
    assert [place for place in places if not (REPOSITORY / place).exists()] == []


RECIPES = [block for page in PAGES if page != STUDY for block in blocks(page, "yaml")]


def whole_recipe(block: Block) -> dict[str, Any]:
    """The smallest recipe with what the block says; a section that is told from the start takes the place of its own."""
    content = yaml.safe_load(RECIPE_YAML)
    said = yaml.safe_load(block.text.replace("THE-40-DIGIT-COMMIT-YOU-MEAN", "a" * 40))
    content["benchmark"]["splits"] = dict.fromkeys(content["benchmark"]["splits"], 1000)
    for name, section in said.items():
        anew = name in ("agent", "benchmark") and {"pretrained", "splits"} & section.keys()
        content[name] = section if anew else {**content.get(name, {}), **section}
    ladder = said.get("precisions", {}).get("ladder")
    if ladder is not None:
        content["precisions"] = {"route": [ladder[0]["name"], ladder[-1]["name"]], **said["precisions"]}
        content.pop("trajectories", None)
    return content


@pytest.mark.parametrize("block", RECIPES, ids=lambda block: block.page.stem)
def test_recipes_on_pages_are_recipes(block: Block, tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(whole_recipe(block)), encoding="utf-8")
    _, problems = check_recipe("page", tmp_path)
    assert problems == []


def test_the_study_on_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    (block,) = blocks(STUDY, "yaml")
    (tmp_path / "study.yaml").write_text(block.text, encoding="utf-8")
    assert list(load_study(tmp_path / "study.yaml").routers) == ["kl", "both", "after"]


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 5


def test_the_episode_on_the_page_is_one() -> None:
    (block,) = blocks(DOCS / "how-to/trajectories-and-releases.md", "json")
    assert [LoggedEpisode.model_validate_json(line).task_id for line in block.text.splitlines()] == ["kitchen/17"]


@cache
def templates() -> list[str]:
    """Every text of the package, `…` in the places of what is put in; neighbouring texts are one."""
    found = []
    for file in (REPOSITORY / "dmr_pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


MESSAGES = [block.text.strip() for block in blocks(DOCS / "how-to/troubleshooting.md", "text")]


def test_ten_messages_are_explained() -> None:
    assert len(set(MESSAGES)) >= 10


@pytest.mark.parametrize("message", MESSAGES)
def test_each_message_is_one_of_the_package(message: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, re.split("…", message))), re.S)
    assert any(pattern.search(template) for template in templates())


COLUMNS = {
    "trajectories/episodes": rollout_tables.EPISODES,
    "trajectories/steps": rollout_tables.STEPS,
    "sensitivity_dataset/steps": labels.STEPS,
    "sensitivity_dataset/drafts": labels.DRAFTS,
    "sensitivity_dataset/consequences": consequence.SWAPPED,
    "quantized_checkpoints/validation": frontier.PLAYED,
    "grpo_router/training": grpo.LOG,
    "evaluation_report/episodes": play.PLAYED,
    "evaluation_report/transcripts": transcripts.TRANSCRIPTS,
    "evaluation_report/openings": transcripts.OPENINGS,
    "evaluation_report/choices": transcripts.CHOICES,
}
TYPES = {pl.String: "text", pl.Int64: "int", pl.Float64: "float", pl.Boolean: "bool", pl.List: "list of"}


def written_type(dtype: pl.DataType) -> str:
    inner = f" {written_type(dtype.inner)}" if isinstance(dtype, pl.List) else ""
    return TYPES[dtype.base_type()] + inner


@pytest.mark.parametrize("table", COLUMNS)
def test_tables_have_the_columns_that_are_described(table: str) -> None:
    stage, _, file = table.partition("/")
    page = (DOCS / "reference/tables.md").read_text(encoding="utf-8")
    section = page.partition(f"## {stage}\n")[2].partition("\n## ")[0]
    described = section.partition(f"`{file}.parquet`: ")[2].partition(".parquet`")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", described, re.M))
    assert rows == {name: written_type(dtype) for name, dtype in COLUMNS[table].items()}
