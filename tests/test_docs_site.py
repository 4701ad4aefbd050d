"""The site that `make docs` builds: whole, without anything from elsewhere, and with answers to what people search for."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import get_type_hints, is_typeddict

import pytest
import typer.main
from typer.core import TyperGroup

from dmr_pipeline import pipeline
from dmr_pipeline.cli import app
from dmr_pipeline.evaluation import results
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.fields import Section
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.pages import blocks

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'dmr-pipeline[docs]'")
CHROMIUM = shutil.which("chromium")
LOADED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
"""Elements that a browser fetches something for, by themselves; and the attribute that says what."""


class Fetched(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADED and (tag != "link" or given.get("rel") != "canonical"):
            self.found.append(given.get(LOADED[tag]) or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page: Path) -> str:
    """What one reads."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert len(parser.found) > 3
        assert [url for url in parser.found if re.match(r"(?:[a-z]+:)?//", url)] == [], page
    for style in site.rglob("*.css"):
        outside = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\"')]+", style.read_text(encoding="utf-8"))
        assert outside == [], style


def keys_of(section: type[Section], path: str) -> Iterator[str]:
    yield from (f"{path}.{name}" for name in section.model_fields)


def test_the_reference_has_every_key_of_a_recipe(site: Path) -> None:
    page = (site / "reference/recipe.html").read_text(encoding="utf-8")
    rows = re.findall(
        r"<tr>\s*<td><code>(\w+)</code></td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", page, re.S
    )
    assert len(rows) > 100
    assert [row for row in rows if not all(cell.strip() for cell in row)] == []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        assert name == "name" or f'<h2 id="{name}">' in page
        if isinstance(section, type) and issubclass(section, Section):
            assert section.model_fields.keys() <= {row[0] for row in rows}
    ladder = page.partition('<h3 id="precisionsladder">')[2]
    assert "<code>int8</code>, <code>int4</code>" in ladder.partition("<h3 ")[0]


def test_the_reference_has_every_stage(site: Path) -> None:
    page = (site / "reference/stages.html").read_text(encoding="utf-8")
    for stage in pipeline.STAGES:
        section = page.partition(f'<h2 id="{stage.name}">')[2].partition("<h2 ")[0]
        assert set(re.findall(r'href="#(\w+)">\1', section)) == set(stage.inputs)
        assert set(re.findall(r'href="recipe.html#(\w+)">', section)) == set(stage.sections)


def paths(command: object, path: str) -> Iterator[str]:
    yield path
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from paths(below, f"{path} {name}")


def test_the_reference_has_every_command(site: Path) -> None:
    page = text_of(site / "reference/cli.html")
    found = list(paths(typer.main.get_command(app), "dmr"))
    assert len(found) > 30
    assert [path for path in found if f"$ {path} " not in page] == []


def test_the_reference_has_every_key_of_metrics(site: Path) -> None:
    page = text_of(site / "reference/metrics-json.html")
    kinds = [kind for kind in vars(results).values() if is_typeddict(kind)]
    assert len(kinds) > 5
    for kind in kinds:
        assert [key for key in get_type_hints(kind) if not re.search(rf"\b{key} ?:", page)] == []


QUESTIONS = {
    "own model": "how-to/own-model",
    "own game": "how-to/own-environment",
    "own router": "how-to/own-router",
    "own precision": "how-to/own-precision",
    "why is my router not better": "how-to/better-router",
    "what does cost mean": "concepts/cost",
    "how do I deploy": "how-to/deploy",
    "what went wrong": "how-to/troubleshooting",
}
MESSAGES = {
    re.sub("…|[^\\w ]", " ", block.text).strip(): "how-to/troubleshooting"
    for block in blocks(REPOSITORY / "docs/how-to/troubleshooting.md", "text")
}
"""As one pastes them, without names and numbers."""


@pytest.fixture
def url(site: Path) -> Iterator[str]:
    """The site on a port of this machine: a browser's worker, which searches, does not start from a file."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")
def test_a_search_answers_what_newcomers_ask(url: str) -> None:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives the browser, is not installed"
    )
    answers: dict[str, list[str]] = {}
    asked, said = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        for question in QUESTIONS | MESSAGES:
            page.goto(f"{url}/index.html")
            page.get_by_role("textbox", name="Search").fill(question)
            page.locator("a.md-search-result__link").first.wait_for(timeout=60_000)
            page.wait_for_timeout(1000)  # the list is made anew as the index has been read
            links = page.locator("li.md-search-result__item > a.md-search-result__link").all()
            targets = [link.get_attribute("href") or "" for link in links]
            answers[question] = [target.partition(".html")[0].removeprefix(f"{url}/") for target in targets]
        browser.close()
    assert {question: answers[question][0] for question in QUESTIONS} == QUESTIONS
    assert len(MESSAGES) >= 10
    assert [
        message for message, page in MESSAGES.items() if page not in list(dict.fromkeys(answers[message]))[:3]
    ] == []
    assert [request for request in asked if not request.startswith((url, "data:", "blob:"))] == []
    assert said == []
