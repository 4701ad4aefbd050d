"""The project's Markdown pages: their links, headings and code blocks."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.fake_project import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "deploy" / "README.md"])
_FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    language: str
    title: str
    """The file that the page asks to write it to; empty where it is none."""
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    found = [Block(page, *match.groups(default="")) for match in _FENCE.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language in languages]


def words(page: str) -> str:
    """All of a page on one line.

    Args:
        page: its path in the repository.
    """
    return " ".join((REPOSITORY / page).read_text(encoding="utf-8").split())


def prose(page: Path) -> str:
    """Without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Targets of the page's links and pictures that lie in this repository."""
    without_code = re.sub(r"`[^`]*`", "", prose(page))
    found = re.findall(r"\]\(([^)\s]+)\)", without_code)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and Python-Markdown make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path, program: str) -> list[list[str]]:
    """Words of each command line that begins with the program, in code blocks and in the text."""
    lines = [line for block in blocks(page, "sh", "bash") for line in block.text.splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    stripped = [re.split(r"\s+#\s|[;|&>]", line.strip())[0] for line in [*lines, *inline]]
    return [line.split() for line in stripped if line == program or line.startswith(f"{program} ")]
