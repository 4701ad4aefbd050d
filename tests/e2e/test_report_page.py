"""The report in a real browser: it opens from the disk, complains of nothing, and can be read with the keyboard alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dmr_pipeline.evaluation.report import render_html
from dmr_pipeline.evaluation.results import Metrics
from tests.helpers.evaluations import Success, make_episodes
from tests.helpers.reports import HOSTILE, kl_of, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
CHROMIUM = shutil.which("chromium")
PAGE_SECONDS = 120
GAMES = 60

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")]


@pytest.fixture(scope="module")
def episodes() -> pl.DataFrame:
    """The router wins games that high loses, and the other way round; it switches most in game 11."""
    game = np.arange(GAMES)
    success: Success = {
        "always_high": ("single", (game % 10 < 9)[None]),
        "always_low": ("single", (game % 2 == 0)[None]),
        "random@kl_router": ("random", (game % 3 < 2)[None]),
        "kl_router": ("router", (game % 5 < 4)[None]),
        "disagreement": ("oracle", (game % 10 < 9)[None]),
    }
    ratios = {"always_high": 1.0, "always_low": 0.0, "random@kl_router": 0.4, "kl_router": 0.5, "disagreement": 0.2}
    costs = {"always_high": 1.0, "always_low": 0.2, "random@kl_router": 0.5, "kl_router": 0.5, "disagreement": 0.3}
    made = make_episodes(success, ratios, costs)
    most = (pl.col("task_id") == "game-0011") & (pl.col("policy") == "kl_router")
    return made.with_columns(switches=pl.when(most).then(9).otherwise("switches"))


@pytest.fixture(scope="module")
def report(episodes: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    folder = tmp_path_factory.mktemp("report")
    metrics = write_report(folder / "evaluation_report", episodes)
    render_html(folder / "evaluation_report", None, folder / "report.html")
    return folder / "report.html", metrics


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390])
def page(
    request: pytest.FixtureRequest, browser: "playwright.Browser", report: tuple[Path, Metrics]
) -> Iterator["playwright.Page"]:
    """Open, with all charts drawn; in the end, nothing was complained of and nothing was asked of the network."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.set_default_timeout(PAGE_SECONDS * 1000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:", "blob:")) else None,
    )
    page.goto(report[0].as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    yield page
    assert said == []
    assert page.title() == "tiny: accuracy and cost of mixed-precision routing"
    page.close()


def focused(page: "playwright.Page") -> str:
    """The text of what has the focus."""
    return page.evaluate("document.activeElement.textContent")


def listed(page: "playwright.Page") -> list[str]:
    """Games, in the order in which they are shown."""
    return page.locator("#episode-list button").evaluate_all("buttons => buttons.map(button => button.dataset.game)")


def won(episodes: pl.DataFrame, policy: str) -> pl.Expr:
    games = episodes.filter(policy=policy, success=True)["task_id"]
    return pl.col("task_id").is_in(games.implode())


def test_charts_are_drawn_and_legends_rule_them(page: "playwright.Page", report: tuple[Path, Metrics]) -> None:
    _, metrics = report
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    charts = page.locator("[data-chart]")
    assert charts.count() == 16
    for i in range(charts.count()):
        if charts.nth(i).is_visible():
            box = charts.nth(i).locator("svg").bounding_box()
            assert box is not None
            assert box["width"] > 200
    marks = page.locator('[data-chart="plane-cost"] .mark-symbol path')
    assert marks.count() == len(metrics["policies"])
    boxes = page.locator('[data-legend="plane"] input')
    boxes.first.focus()
    page.keyboard.press("Space")
    playwright.expect(marks).to_have_count(len(metrics["policies"]) - 1)
    page.locator('[data-legend="plane"]').get_by_role("button", name="none").click()
    playwright.expect(marks).to_have_count(0)
    page.locator('[data-legend="plane"] label', has_text="kl_router").last.click()
    playwright.expect(marks).to_have_count(1)
    marks.hover()
    policy = metrics["policies"]["kl_router"]
    tip = page.locator("#tip")
    for told in ("kl_router", f"{policy['success']:.1%}", f"{policy['cost']:.3f}", "gain at equal cost"):
        playwright.expect(tip).to_contain_text(told)
    page.mouse.move(0, 0)
    playwright.expect(tip).to_be_hidden()
    page.locator('[name="plane-axis"][value="spend"]').check()
    playwright.expect(page.locator('[data-chart="plane-cost"]')).to_be_hidden()
    drawn = page.locator('[data-chart="plane-spend"] svg')
    playwright.expect(drawn).to_be_visible()
    page.wait_for_function("document.querySelector('[data-chart=\"plane-spend\"] svg').clientWidth > 200")


def test_filters_and_orders_select_what_the_tables_say(page: "playwright.Page", episodes: pl.DataFrame) -> None:
    games = episodes.filter(policy="kl_router")
    router, high, low = (won(episodes, policy) for policy in ("kl_router", "always_high", "always_low"))
    outcome = page.locator("#episode-outcome")
    for value, wanted in {
        "all": pl.lit(True),
        "lost-high-won": ~router & high,
        "won-high-lost": router & ~high,
        "won-low-lost": router & ~low,
        "lost": ~router,
        "won": router,
    }.items():
        outcome.select_option(value)
        selected = games.filter(wanted)["task_id"].to_list()
        assert sorted(listed(page)) == sorted(selected)
        playwright.expect(page.locator("#episode-count")).to_have_text(f"{len(selected)} of {GAMES} games")
    page.locator("#episode-type").select_option("odd")
    assert sorted(listed(page)) == games.filter(router, task_type="odd")["task_id"].to_list()
    page.locator("#episode-type").select_option("")
    outcome.select_option("all")
    page.locator("#episode-order").select_option("switches")
    assert listed(page)[0] == "game-0011"
    page.locator("#episode-order").select_option("divergence")
    diverging = sorted(range(GAMES), key=lambda game: -kl_of(game, 4))
    assert listed(page)[:3] == [f"game-{game:04d}" for game in diverging[:1]] + listed(page)[1:3]
    assert set(listed(page)[1:3]) == {"game-0036", "game-0038"}
    page.locator("#episode-who").select_option("always_low")
    assert page.locator("#episode-order option[value=divergence]").is_disabled()


def test_an_episode_is_walked_through_with_the_keyboard(page: "playwright.Page") -> None:
    current = page.locator('#episode-list [aria-current="true"]')
    current.focus()
    first = focused(page)
    page.keyboard.press("ArrowDown")
    assert focused(page) != first
    assert page.evaluate("document.activeElement.matches(':focus-visible')")
    page.keyboard.press("ArrowUp")
    assert focused(page) == first
    page.locator('#episode-steps [aria-current="step"]').focus()
    playwright.expect(page.locator("#step-title")).to_have_text("Turn 0: int2 acts")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert focused(page) == "5"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    playwright.expect(page.locator("#step-title")).to_have_text("Turn 5: float acts")
    rows = page.locator("#step-choices tr")
    playwright.expect(rows.first).to_have_text("float ◀ actsgo to shelf 50.900–")
    playwright.expect(rows.last).to_contain_text("take <b>5</b>0.800")
    playwright.expect(page.locator("#step-probabilities")).to_contain_text(
        "probability of float: 0.500 (threshold 0.500)"
    )
    playwright.expect(page.locator("#step-seen")).to_have_text(f"kl_router sees {HOSTILE} at 4")
    playwright.expect(page.locator("#step-shown")).to_have_text(f"kl_router sees {HOSTILE} at 5")
    page.keyboard.press("End")
    playwright.expect(page.locator("#step-title")).to_have_text("Turn 9, the last: float acts")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "9"
    page.keyboard.press("Home")
    assert focused(page) == "0"
    differing = page.locator("#episode-steps .differs")
    assert differing.all_text_contents() == ["1", "3", "5", "7", "9"]
    other = page.locator("#episode-policies button", has_text="always_high")
    other.focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#episode-who")).to_have_value("always_high")
    playwright.expect(page.locator("#step-title")).to_have_text("Turn 0: float acts")
    playwright.expect(page.locator("#step-unknown")).to_be_visible()


def test_colours_follow_the_dark_scheme(browser: "playwright.Browser", report: tuple[Path, Metrics]) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(report[0].as_uri())
    page.wait_for_selector("html[data-ready]", state="attached", timeout=PAGE_SECONDS * 1000)
    mark = page.locator('[data-chart="plane-cost"] .mark-symbol path').first
    assert mark.get_attribute("stroke") == "#e6e9ed"
    page.emulate_media(color_scheme="light")
    playwright.expect(page.locator('[data-chart="plane-cost"] .mark-symbol path').first).to_have_attribute(
        "stroke", "#1f2933", timeout=PAGE_SECONDS * 1000
    )
    page.close()
