"""The pictures of Dagster's UI in docs/how-to/dagster-ui.md, and of the report: `make screenshots`, after `make demo`.

Starts the web server on the instance of DAGSTER_HOME, looks at it with Chromium, and writes `docs/screenshots/*.png`.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import dagster as dg
from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

from dmr_pipeline import pipeline
from dmr_pipeline.errors import UserError

FOLDER = Path(__file__).parent / "screenshots"
WIDTH, HEIGHT = 1500, 900
"""Of a picture, in pixels."""
GRAPH_HEIGHT = 1000
FITTED_WIDTH = 1580
"""Dagster fits the graph into the window as it is at first, with the list beside it, which is closed afterwards."""
SETTLED_MS = 2000
"""For pictures, fonts and animations once the page has its content."""


def last_run(recipe: str) -> str:
    """Id of the run that has made the recipe's report.

    Raises:
        UserError: there is none.
    """
    with dg.DagsterInstance.get() as instance:
        records = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=dg.AssetKey("evaluation_report"), asset_partitions=[recipe]), limit=1
        ).records
    if not records:
        raise UserError(f"{os.environ.get('DAGSTER_HOME')} knows of no report of {recipe}: run `make demo` first")
    return records[0].run_id


@contextmanager
def web_server() -> Iterator[str]:
    """Its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Path(sys.executable).with_name("dagster-webserver")
    quiet = ["--dagster-log-level", "warning", "--code-server-log-level", "warning"]
    process = subprocess.Popen([server, "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port), *quiet])
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                raise UserError(f"{server} has ended with exit code {process.returncode}: see its messages above")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browser_page() -> Iterator[Page]:
    """Raises: UserError: there is no Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise UserError("there is no `chromium` on the PATH: install it")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1)
        page.add_init_script("localStorage.setItem('dagster-nav-collapsed', 'true')")
        page.set_default_timeout(120_000)
        try:
            yield page
        finally:
            browser.close()


def take(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(SETTLED_MS)
    path = FOLDER / f"{name}.png"
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    # A palette makes the file a third of the size; this method also keeps colours of which there is little.
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")  # noqa: T201


def asset_graph(page: Page, url: str) -> None:
    """All stages, in their groups; the recipe's sections would be as many again."""
    groups = sorted({stage.group for stage in pipeline.STAGES})
    expanded = ",".join(f"global@global:{group}" for group in groups)
    page.set_viewport_size({"width": FITTED_WIDTH, "height": GRAPH_HEIGHT})
    selection = 'not group:"recipe"'
    page.goto(f"{url}/asset-groups~{quote(selection)}/?expanded={quote(expanded)}")
    page.get_by_text("evaluation_report").first.wait_for()
    page.wait_for_timeout(SETTLED_MS)
    page.get_by_role("button").filter(has=page.get_by_role("img", name="panel_show_right")).click()
    page.set_viewport_size({"width": WIDTH, "height": GRAPH_HEIGHT})
    take(page, "asset_graph")
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})


def report(page: Page, url: str, recipe: str) -> None:
    """The table of policies, and the picture that a click shows."""
    page.goto(f"{url}/assets/evaluation_report?view=partitions&partition={quote(recipe)}")
    metadata_row(page, "table").evaluate("row => row.scrollIntoView()")
    take(page, "evaluation_report")
    metadata_row(page, "picture/accuracy_cost").get_by_text("Show Markdown").click()
    page.get_by_role("dialog").get_by_role("img", name="accuracy_cost").wait_for()
    take(page, "evaluation_picture")


def episode(page: Page, recipe: str) -> None:
    """The report's viewer: of the games that the router lost and always-high won, where the precisions first differ."""
    page.goto((Path("data") / recipe / "report.html").resolve().as_uri())
    page.locator("html[data-ready]").wait_for(state="attached")
    page.locator("#episode-outcome").select_option("lost-high-won")
    page.locator("#episode-order").select_option("divergence")
    page.locator("#episode-steps .differs").first.click()
    page.set_viewport_size({"width": 1200, "height": 1060})
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    page.locator(".filters").evaluate("filters => filters.scrollIntoView()")
    take(page, "report_episode")
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})


def metadata_row(page: Page, key: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_text(key, exact=True))


def checks(page: Page, url: str) -> None:
    page.goto(f"{url}/assets/quantized_checkpoints?view=checks&checkDetail=divergence_grows_down_the_ladder")
    page.get_by_text("Evaluation result").wait_for()
    take(page, "checks")


def run(page: Page, url: str, run_id: str) -> None:
    page.goto(f"{url}/runs/{run_id}")
    page.get_by_text("RUN_SUCCESS").first.wait_for()
    take(page, "run")


def main(recipe: str) -> None:
    run_id = last_run(recipe)
    FOLDER.mkdir(exist_ok=True)
    with browser_page() as page, web_server() as url:
        asset_graph(page, url)
        report(page, url, recipe)
        checks(page, url)
        run(page, url, run_id)
        episode(page, recipe)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UserError as error:
        sys.exit(f"error: {error}")
