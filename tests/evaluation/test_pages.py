"""Results pages: the committed ones are what the committed metrics make, and what they say in words is there."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dmr_pipeline.artifacts.folders import artifact_folder, sidecar_path
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation import pages
from dmr_pipeline.evaluation.picture import draw
from dmr_pipeline.evaluation.results import Metrics, PairedComparison, PolicyMetrics, shown_name
from dmr_pipeline.recipe import Recipe
from tests.helpers.commands import dmr
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.pages import words

DEMO = "alfworld-tiny"
FRONT = "alfworld-smollm2"
"""Of README."""
KEPT = sorted(file.name.removesuffix(".metrics.json") for file in (REPOSITORY / pages.RESULTS).glob("*.metrics.json"))
PLACED = {
    page: set(re.findall(r"<!-- dmr report (\S+): ", page.read_text(encoding="utf-8")))
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pages of the demo and of README's recipe, and the metrics that they are made from."""
    kinds = (".md", ".metrics.json", ".runs.json")
    for name in ("README.md", *(f"{pages.RESULTS}/{recipe}{kind}" for recipe in (DEMO, FRONT) for kind in kinds)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def demo() -> Metrics:
    return pages.read_result(DEMO, REPOSITORY / pages.RESULTS).metrics


@pytest.fixture(scope="module")
def front() -> Metrics:
    return pages.read_result(FRONT, REPOSITORY / pages.RESULTS).metrics


def test_there_are_pages_of_kept_metrics() -> None:
    assert {DEMO, FRONT} <= set(KEPT)
    assert FRONT in PLACED[REPOSITORY / "README.md"]
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
    page = Path(f"{pages.RESULTS}/{FRONT}.md")
    for name in (Path("README.md"), page):
        before = name.read_text(encoding="utf-8")
        assert "91.5% [86.8, 94.6]" in before
        name.write_text(before.replace("91.5% [86.8, 94.6]", "99.0% [98.0, 99.9]"), encoding="utf-8")
        assert pages.write_pages(FRONT)[name] is True
        assert name.read_text(encoding="utf-8") == before
    assert pages.write_pages(FRONT) == {Path("README.md"): False, page: False}


def test_the_short_table_says_what_the_metrics_say(front: Metrics) -> None:
    """By another way through the file."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"<!-- dmr report {FRONT}: brief -->")[2].partition("<!-- end -->")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+)% \[([\d.]+), ([\d.]+)\] \| ([\d.]+) \| (\d+)% \|$", section, re.M)
    names = ["always_high", "speculative:int8<int4-gptq", "always_low", "random@grpo_router", "grpo_router"]
    assert len(rows) == len(names)
    for name, (_, *shown) in zip(names, rows, strict=True):
        found = front["policies"][name]
        numbers = [
            100 * found["success"],
            *(100 * end for end in found["ci95"]),
            found["cost"],
            round(100 * found["high_ratio"]),
        ]
        assert list(map(float, shown)) == pytest.approx(numbers, abs=0.051)


def pair(metrics: Metrics, policy: str, against: str) -> PairedComparison:
    (found,) = [one for one in metrics["paired"] if (one["policy"], one["against"]) == (policy, against)]
    return found


def test_the_text_beside_the_tables_says_what_they_say(demo: Metrics) -> None:
    policies = demo["policies"]
    router, high, grpo = policies["kl_router"], policies["always_high"], policies["grpo_router"]
    low_end, high_end = (f"{100 * end:.0f}" for end in router["gap_ci95"] or [])
    random, confidence, int4 = (
        pair(demo, "kl_router", name) for name in ("random@kl_router", "confidence", "always_int4")
    )
    readme, page = words("README.md"), words(f"{pages.RESULTS}/{DEMO}.md")
    alone = policies["always_int4"]
    assert f"wins {alone['success']:.1%} at int4 for {alone['cost']:.2f}, its router" in readme
    assert f"plain int2, {router['success']:.1%} for {router['cost']:.2f}" in readme
    assert f"{100 * random['difference']:.1f} points above random mixing" in readme

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


def test_what_is_said_of_the_real_llm_is_what_its_metrics_say(front: Metrics) -> None:
    policies, page = front["policies"], words(f"{pages.RESULTS}/{FRONT}.md")
    high, low, router, kl = (policies[name] for name in ("always_high", "always_low", "grpo_router", "kl_router"))
    by_chance, by_chance_of_kl = policies["random@grpo_router"], policies["random@kl_router"]
    checks, oracle = policies["speculative:int8<int4-gptq"], policies["disagreement"]
    (rule,) = front["curves"]["margin"]["points"]

    def at(policy: PolicyMetrics) -> str:
        return f"{policy['success']:.1%} at {policy['cost']:.3f}"

    def beside(policy: str, against: str) -> str:
        found = pair(front, policy, against)
        low_end, high_end = found["ci95"]
        span = f"{100 * low_end:.1f} to {'+' if low_end < 0 < high_end else ''}{100 * high_end:.1f}"
        return f"{100 * found['difference']:+.1f} points ({span})"

    assert front["headline"] == "grpo_router"
    assert f"`grpo_router`, which validation games chose, wins {at(router)}, `kl_router`, of stage 1, {at(kl)}" in page
    assert f"int8 alone wins {at(high)}, int4 {at(low)}" in page
    assert f"saves {1 - router['cost'] / high['cost']:.0%} of int8's cost" in page
    assert f"to int8 the difference is {beside('grpo_router', 'always_high')}" in page
    assert f"as often as a router wins {at(by_chance)} and {at(by_chance_of_kl)}" in page
    assert f"to that the difference is {beside('grpo_router', 'random@grpo_router')}" in page
    assert f"and {beside('kl_router', 'random@kl_router')}" in page
    assert f"set to a fifth of the steps it wins {rule['success']:.1%} at {rule['cost']:.3f}" in page
    assert front["best_rules"] == {}, "none cost as little as the routers on validation games"
    planned = [row for row in front["paired"] if row["p_holm"] is not None]
    assert f"the least of the {len(planned)} planned p-values is {min(row['p_holm'] for row in planned):.3f}" in page
    seen = [100 * (row["smallest_difference"] or 1) for row in planned]
    assert f"they could have seen {min(seen):.1f} to {max(seen):.1f} points" in page
    assert f"all of int4's drafts wins {at(checks)}" in page
    asked = f"({oracle['high_ratio']:.1%} of the steps)"
    assert f"{asked}, wins {at(oracle)}" in page


@pytest.mark.parametrize(
    ("recipe", "without"), [(FRONT, "speculative:int8<int4-gptq"), (DEMO, "always_int4")], ids=[FRONT, DEMO]
)
def test_the_page_on_what_routing_buys_says_what_the_metrics_say(recipe: str, without: str) -> None:
    metrics = pages.read_result(recipe, REPOSITORY / pages.RESULTS).metrics
    text = (REPOSITORY / "docs/concepts/when-routing-pays.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if f"results/{recipe}.md), 200 games" in line)
    shown = [tuple(map(float, found)) for found in re.findall(r"([\d.]+)% at ([\d.]+)", row)]
    policies = [metrics["policies"][name] for name in ("always_high", "always_low", without, metrics["headline"])]
    assert shown == [(round(100 * one["success"], 1), round(one["cost"], 2)) for one in policies]


def test_the_picture_is_of_the_committed_metrics(front: Metrics, tmp_path: Path) -> None:
    """Its points' coordinates, as far as another matplotlib would give them too."""
    draw(front, tmp_path / "new.svg")
    new, committed = (
        [float(number) for number in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="[\d.]+"', file.read_text())]
        for file in (tmp_path / "new.svg", REPOSITORY / pages.RESULTS / f"{FRONT}.svg")
    )
    assert len(new) > len(front["policies"])
    assert new == pytest.approx(committed, abs=0.5)


def test_policies_are_named_in_words(demo: Metrics, front: Metrics) -> None:
    named = {name: shown_name(name, demo) for name in demo["policies"]}
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
    sidecar_path(artifact_folder("evaluation_report", name)).unlink()  # as where the artifact came from elsewhere
    again = dmr("report", name, "--markdown")
    assert again.exit_code == 0, again.output
    assert json.loads((pages.RESULTS / f"{name}.runs.json").read_text()) == runs
    (pages.RESULTS / f"{name}.runs.json").unlink()
    unknown = dmr("report", name, "--markdown")
    assert (unknown.exit_code, "was made on another machine" in unknown.output) == (2, True)
    assert "Made on " in Path("README.md").read_text(encoding="utf-8")


def test_without_metrics_the_command_says_how_to_get_them(project: Recipe) -> None:
    result = dmr("report", project.name, "--markdown")
    assert result.exit_code == 2
    assert re.fullmatch(r".*fake\.metrics\.json.*`dmr run fake`.*\n", result.stderr)


def test_what_is_said_of_the_real_llm_in_webshop_is_what_its_ladder_and_its_agent_say() -> None:
    page, concept = map(words, (f"{pages.RESULTS}/webshop-smollm2.md", "docs/concepts/when-routing-pays.md"))
    agent = verify(REPOSITORY / "data" / "webshop-smollm2" / "agent").manifest.summary
    assert f"Of the {agent['validation_games']} validation goals it won {agent['validation_success']:.1%}" in page
    row = r"\| (\w[\w-]*) \|(?: [\d.%]+ \|){4} ([\d.]+)% \[[^]]+\] \| ([\d.]+) \(([\d.]+) \+ ([\d.]+)\) \| [\d.]+ \| ([-\d.]+)"
    ladder = {name: tuple(map(float, rest)) for name, *rest in re.findall(row, page) if rest[-1] != "-"}
    whole = re.search(r"\| float \|(?: [\d.%]+ \|){4} ([\d.]+)% \[[^]]+\] \| ([\d.]+) ", page)
    assert whole is not None
    success, cost = map(float, whole.groups())
    assert set(ladder) == {"int8", "int4-gptq", "int3-gptq"}
    for name, (won, price, weights, cache, lost) in ladder.items():
        assert price == pytest.approx(weights + cache, abs=0.0011)
        if name != "int3-gptq":  # which stopped: what float has won on as many goals is not on the page
            assert lost == pytest.approx(success - won, abs=0.051)
    won, price, *_ = ladder["int4-gptq"]
    assert (
        f"int4-gptq ({won}% at a cost of {price}) is at most 5 points worse than float ({success}% at a cost of {cost})"
        in page
    )
    assert (
        f"int4 with prompt lookup costs {price:.0%} of a bfloat16 episode at a pass a token, bfloat16 with it {cost:.0%}"
        in page
    )
    assert won == success
    assert f"{won}% of 200 validation goals at both, for {price:.2f} and {cost:.2f} with prompt lookup" in concept
