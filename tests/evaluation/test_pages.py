"""Results pages: the committed ones are what the committed metrics make, and what they say in words is there."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation import pages
from dmr_pipeline.evaluation.picture import draw
from dmr_pipeline.evaluation.results import Metrics, PairedComparison
from dmr_pipeline.recipe import Recipe
from tests.helpers.commands import dmr
from tests.helpers.fake_project import REPOSITORY

DEMO = "alfworld-tiny"
KEPT = sorted(file.name.removesuffix(".metrics.json") for file in (REPOSITORY / pages.RESULTS).glob("*.metrics.json"))
PLACED = {
    page: set(re.findall(r"<!-- dmr report (\S+): ", page.read_text(encoding="utf-8")))
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's pages, and the metrics that they are made from."""
    for name in (
        "README.md",
        f"{pages.RESULTS}/{DEMO}.md",
        *(f"{pages.RESULTS}/{DEMO}.{of}.json" for of in ("metrics", "runs")),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def demo() -> Metrics:
    return pages.read_result(DEMO, REPOSITORY / pages.RESULTS).metrics


def test_there_are_pages_of_kept_metrics() -> None:
    assert DEMO in KEPT
    assert DEMO in PLACED[REPOSITORY / "README.md"]
    assert set().union(*PLACED.values()) - {"RECIPE"} == set(KEPT)


@pytest.mark.parametrize("recipe", KEPT)
def test_committed_pages_are_made_from_the_committed_metrics(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("dmr_pipeline.evaluation.picture.draw", lambda metrics, path: None)
    result = pages.read_result(recipe)
    assert result.metrics["recipe"] == recipe
    for page, recipes in PLACED.items():
        if recipe in recipes:
            text = page.read_text(encoding="utf-8")
            assert pages.filled(text, page.relative_to(REPOSITORY), recipe, result) == text


def test_a_changed_number_comes_back(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmr_pipeline.evaluation.picture.draw", lambda metrics, path: path.touch())
    for name in ("README.md", f"{pages.RESULTS}/{DEMO}.md"):
        before = Path(name).read_text(encoding="utf-8")
        assert "86.0% [80.5, 90.1]" in before
        Path(name).write_text(before.replace("86.0% [80.5, 90.1]", "99.0% [98.0, 99.9]"), encoding="utf-8")
        assert pages.write_pages(DEMO)[Path(name)] is True
        assert Path(name).read_text(encoding="utf-8") == before
    assert pages.write_pages(DEMO) == {Path("README.md"): False, Path(f"{pages.RESULTS}/{DEMO}.md"): False}


def test_the_short_table_says_what_the_metrics_say(demo: Metrics) -> None:
    """By another way through the file."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"<!-- dmr report {DEMO}: brief -->")[2].partition("<!-- end -->")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+)% \[([\d.]+), ([\d.]+)\] \| ([\d.]+) \| (\d+)% \|$", section, re.M)
    names = ["always_high", "always_low", "random@kl_router", "kl_router", "always_int4"]
    assert len(rows) == len(names)
    for name, (_, *shown) in zip(names, rows, strict=True):
        found = demo["policies"][name]
        numbers = [
            100 * found["success"],
            *(100 * end for end in found["ci95"]),
            found["cost"],
            100 * found["high_ratio"],
        ]
        assert list(map(float, shown)) == pytest.approx(numbers, abs=0.051 if name != "always_low" else 0.06, rel=0.006)


def pair(metrics: Metrics, policy: str, against: str) -> PairedComparison:
    (found,) = [one for one in metrics["paired"] if (one["policy"], one["against"]) == (policy, against)]
    return found


def words(page: str) -> str:
    return " ".join((REPOSITORY / page).read_text(encoding="utf-8").split())


def test_the_text_beside_the_tables_says_what_they_say(demo: Metrics) -> None:
    policies = demo["policies"]
    router, high, grpo = policies["kl_router"], policies["always_high"], policies["grpo_router"]
    low_end, high_end = (f"{100 * end:.0f}" for end in router["gap_ci95"] or [])
    random, confidence, int4 = (
        pair(demo, "kl_router", name) for name in ("random@kl_router", "confidence", "always_int4")
    )
    front, page = words("README.md"), words(f"{pages.RESULTS}/{DEMO}.md")
    assert f"wins back {router['gap_recovered']:.0%} of what int2 loses (interval {low_end} to {high_end})" in front
    assert f"{100 * random['difference']:.1f} points more than random mixing" in front

    def spans(found: PairedComparison) -> str:
        return f"({100 * abs(found['ci95'][0]):.1f} to {100 * abs(found['ci95'][1]):.1f}"

    assert f"wins {router['success']:.1%} at high precision in {router['high_ratio']:.1%} of the steps" in page
    assert f"{router['gap_recovered']:.0%} of the gap (interval {low_end} to {high_end})" in page
    assert f"at {router['cost'] / high['cost']:.0%} of always-high's cost" in page
    assert f"by {100 * random['difference']:.1f} points {spans(random)}, p = {random['p_holm']:.3f})" in page
    assert f"by {100 * confidence['difference']:.1f} {spans(confidence)}, p < 0.001)" in page
    assert f"loses {-100 * int4['difference']:.1f} points to always_int4" in page
    assert (
        f"wins {-100 * pair(demo, 'kl_router', 'always_high')['difference']:.1f} points less than always-high" in page
    )
    assert f"wins {100 * (grpo['success'] - router['success']):.1f} points more on these games" in page
    checked = policies["speculative:float<int2"]
    assert f"at {checked['cost'] / high['cost']:.0%} of its cost: {checked['acting_passes']:.1f} passes" in page
    assert f"shows that {policies['disagreement']['high_ratio']:.0%} of the steps would do" in page


def test_the_picture_is_of_the_committed_metrics(demo: Metrics, tmp_path: Path) -> None:
    """Its points' coordinates, as far as another matplotlib would give them too."""
    draw(demo, tmp_path / "new.svg")
    new, committed = (
        [float(number) for number in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="[\d.]+"', file.read_text())]
        for file in (tmp_path / "new.svg", REPOSITORY / pages.RESULTS / f"{DEMO}.svg")
    )
    assert len(new) > len(demo["policies"])
    assert new == pytest.approx(committed, abs=0.5)


def test_policies_are_named_in_words(demo: Metrics) -> None:
    named = {name: pages.shown_name(name, demo) for name in demo["policies"]}
    assert named["always_high"] == "float alone"
    assert named["always_low"] == "int2 alone"
    assert named["speculative:float<int2"] == "int2 drafts, float checks"
    assert named["kl_router"] == "kl_router, the chosen router"
    assert len(set(named.values())) == len(named)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "a place for alfworld-tiny: write `<!-- dmr report alfworld-tiny: table -->`"),
        (
            f"<!-- dmr report {DEMO}: poem -->\n<!-- end -->\n",
            "no such part, there are table, curves, brief, run, picture",
        ),
        (f"<!-- dmr report {DEMO}: table -->\ntext\n", "README.md: a place of alfworld-tiny has no `<!-- end -->`"),
        (
            f"<!-- dmr report {DEMO}: table -->\n<!-- dmr report {DEMO}: run -->\n<!-- end -->\n",
            "has no `<!-- end -->`",
        ),
    ],
)
def test_places_that_cannot_be_filled_are_refused(checkout: Path, text: str, said: str) -> None:
    Path(f"{pages.RESULTS}/{DEMO}.md").unlink()
    Path("README.md").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        pages.write_pages(DEMO)
    assert Path("README.md").read_text(encoding="utf-8") == text


def test_places_of_other_recipes_are_left_alone(checkout: Path) -> None:
    other = "<!-- dmr report own: anything -->\nold\n<!-- end -->\n"
    Path("README.md").write_text(f"{other}<!-- dmr report {DEMO}: run -->\n<!-- end -->\n", encoding="utf-8")
    pages.write_pages(DEMO)
    text = Path("README.md").read_text(encoding="utf-8")
    assert text.startswith(other)
    assert "on 2 cores" in text


def test_a_finished_run_is_kept_for_the_pages(finished_project: Recipe) -> None:
    name = finished_project.name
    Path("README.md").write_text(f"<!-- dmr report {name}: run -->\n<!-- end -->\n", encoding="utf-8")
    result = dmr("report", name, "--markdown")
    assert result.exit_code == 0, result.output
    assert "README.md written." in result.stdout
    assert "README.md is up to date." in dmr("report", name, "--markdown").stdout
    made = artifact_folder("evaluation_report", name) / "metrics.json"
    assert (pages.RESULTS / f"{name}.metrics.json").read_bytes() == made.read_bytes()
    runs = json.loads((pages.RESULTS / f"{name}.runs.json").read_text())
    assert runs["evaluation_report"]["seconds"] >= 0
    assert "Made on " in Path("README.md").read_text(encoding="utf-8")


def test_without_metrics_the_command_says_how_to_get_them(project: Recipe) -> None:
    result = dmr("report", project.name, "--markdown")
    assert result.exit_code == 2
    assert re.fullmatch(r".*fake\.metrics\.json.*`dmr run fake`.*\n", result.stderr)
