"""What a user does in Dagster's UI, in a real browser: materialise, look at what was made, and at what went wrong."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.defs.automation import UNFINISHED
from tests.helpers.dagster_processes import enter_dagster_project, running, wait_until
from tests.helpers.fake_project import RECIPE, dvc, make_recipe
from tests.helpers.location import PICTURE_SIZE, SPOILT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
CHROMIUM = shutil.which("chromium")
PAGE_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def browser_page() -> Iterator["playwright.Page"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.set_default_timeout(PAGE_SECONDS * 1000)
        playwright.expect.set_options(timeout=PAGE_SECONDS * 1000)
        try:
            yield page
        finally:
            browser.close()


def materialize_all(page: "playwright.Page", url: str, recipe: str) -> None:
    """From the asset graph, for one partition; ends on the page of the run, which has ended too."""
    page.goto(f"{url}/asset-groups")
    page.get_by_role("button", name="Materialize all").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Select a partition").click()
    page.get_by_role("menuitem").filter(has_text=recipe).click()
    page.keyboard.press("Escape")  # closes the list
    playwright.expect(dialog.get_by_text("1 partition", exact=True)).to_be_visible()
    dialog.get_by_role("button", name="Launch 1 run").click()
    page.get_by_role("link", name="View", exact=True).click()
    playwright.expect(page.get_by_text(f"partition: {recipe}")).to_be_visible()
    run = page.url
    page.goto("about:blank")  # following a run costs the browser as much as the run costs
    with dg.DagsterInstance.get() as instance:
        wait_until(lambda: not instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)), "the run has ended")
    page.goto(run)


def value_of(page: "playwright.Page", key: str) -> "playwright.Locator":
    """The row of the metadata table."""
    return page.get_by_role("row").filter(has=page.get_by_text(key, exact=True))


def open_checks(page: "playwright.Page", name: str) -> None:
    page.get_by_text("Checks", exact=True).click()
    page.get_by_title(name).first.click()
    page.wait_for_url(f"**checkDetail={name}*")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")
def test_a_user_s_way_through_the_ui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_dagster_project(tmp_path, monkeypatch)
    make_recipe(SPOILT)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    expect = playwright.expect
    with running("dagster", "dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)), browser_page() as page:
        wait_until(lambda: answers(port), "the web server is up")

        materialize_all(page, url, RECIPE)
        expect(page.get_by_text("Success", exact=True)).to_be_visible()

        page.goto(f"{url}/assets/evaluation_report?view=partitions&partition={RECIPE}")
        artifact = verify(artifact_folder("evaluation_report", RECIPE))
        expect(value_of(page, "hash")).to_contain_text(artifact.hash)
        expect(value_of(page, "summary/inputs")).to_contain_text("5")
        expect(page.get_by_role("cell", name="always_high", exact=True)).to_be_visible()
        value_of(page, "picture/cost").get_by_text("Show Markdown").click()
        picture = page.get_by_role("dialog").get_by_role("img", name="cost")
        expect(picture).to_be_visible()
        assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == list(PICTURE_SIZE)
        page.keyboard.press("Escape")
        open_checks(page, "all_policies_and_sane_intervals")
        expect(page.get_by_text("Passed", exact=True)).to_be_visible()

        page.goto(f"{url}/assets/trajectories?view=partitions&partition={RECIPE}")
        expect(value_of(page, "dagster/row_count")).to_contain_text("3")

        materialize_all(page, url, SPOILT)
        expect(page.get_by_text("Failure", exact=True)).to_be_visible()
        page.goto(f"{url}/assets/trajectories")
        open_checks(page, "steps_and_episodes_are_complete")
        expect(page.get_by_text("Failed", exact=True).last).to_be_visible()
        expect(page.get_by_text("expect_compound_columns_to_be_unique").first).to_be_visible()
        page.goto(f"{url}/assets/sensitivity_dataset?view=partitions&partition={SPOILT}")
        expect(page.get_by_text("did not materialize this asset")).to_be_visible()
    assert artifact_folder("trajectories", SPOILT).is_dir()
    assert not artifact_folder("sensitivity_dataset", SPOILT).exists()
    said = dvc("repro", f"evaluation_report@{RECIPE}", f"released_router@{RECIPE}")
    assert "Running stage" not in said
    assert "Data and pipelines are up to date" in said
