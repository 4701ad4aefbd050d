import io
import json
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.metrics import compute_metrics
from dmr_pipeline.evaluation.report import console_table, curves_table, headline, markdown_table, render_html
from dmr_pipeline.evaluation.results import Metrics
from tests.helpers.evaluations import ROUTE, THREE, with_checked, with_curves, with_rule


@pytest.fixture
def metrics(episodes: pl.DataFrame) -> Metrics:
    return compute_metrics(
        episodes, recipe="tiny", route=ROUTE, high="always_high", low="always_low", headline="kl_router"
    )


@pytest.fixture
def metrics_of_three(of_three: pl.DataFrame) -> Metrics:
    names = {"high": "always_high", "low": "always_low", "headline": "kl_router"}
    return compute_metrics(of_three, recipe="tiny", route=THREE, **names)


@pytest.fixture
def folder(tmp_path: Path, metrics: Metrics) -> Path:
    folder = tmp_path / "evaluation_report"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


class Page(HTMLParser):
    """Text, references to other files, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "br", "wbr", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.data = False
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("link", "iframe") or "src" in values or not (values.get("href") or "#").startswith("#"):
            self.references.append(tag)
        self.data = tag in ("script", "style")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.data = False

    def handle_data(self, data: str) -> None:
        if not self.data:
            self.words.append(data)


def render(folder: Path, sidecar: Path | None = None) -> Page:
    html = folder.parent / "out" / "report.html"
    render_html(folder, sidecar, html)
    assert [path.name for path in html.parent.iterdir()] == ["report.html"]
    text = html.read_text(encoding="utf-8")
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style
    page = Page(text)
    assert page.open == []
    assert page.references == []
    return page


def test_headline_says_what_came_out(metrics: Metrics) -> None:
    text = " ".join(headline(metrics))
    assert "On 100 test games kl_router, the router chosen on validation, succeeds in 85.0%" in text
    assert "at 40.0% of the steps; always_high succeeds in 90.0%, always_low in 50.0%." in text
    assert "It recovers 88% of the gap between always_high and always_low" in text
    assert "costs 50% of what one of always_high does" in text
    assert "it is better in the paired test" in text
    assert "p < 0.001" in text


def test_headline_is_honest_about_bad_news(episodes: pl.DataFrame) -> None:
    """The router's episodes swapped with random's, a dear router, and a high precision that is no better than low."""
    arguments = {"recipe": "tiny", "route": ROUTE, "high": "always_high", "low": "always_low", "headline": "kl_router"}

    def like(policy: str, model: str) -> pl.DataFrame:
        copied = episodes.filter(policy=model, draw=0).select("task_id", "success", "reward")
        changed = episodes.filter(policy=policy).drop("success", "reward").join(copied, on="task_id")
        changed = changed.select(episodes.columns)
        return pl.concat([episodes.filter(pl.col("policy") != policy), changed])

    worse = compute_metrics(like("kl_router", "always_low"), **arguments)
    assert "it is worse in the paired test" in " ".join(headline(worse))
    equal = compute_metrics(like("random@kl_router", "kl_router"), **arguments)
    assert "no difference is shown: +0.0 points" in " ".join(headline(equal))
    no_gap = compute_metrics(like("always_high", "always_low"), **arguments)
    assert "always_low wins no fewer games than always_high here, so there is no gap" in " ".join(headline(no_gap))
    dear = episodes.with_columns(cost=pl.when(policy="kl_router").then(1.5).otherwise("cost"))
    assert "It saves nothing: an episode costs 1.50 times always_high's" in " ".join(
        headline(compute_metrics(dear, **arguments))
    )


@pytest.mark.parametrize(
    ("solved", "cost", "said"),
    [
        (85, 0.5, "as much at the same cost"),
        (85, 0.4, "as much for less"),
        (84, 0.5, ""),
        (85, 0.51, ""),
        (90, 0.3, "more for less"),
    ],
)
def test_headline_names_the_precision_that_makes_a_router_needless(
    episodes: pl.DataFrame, solved: int, cost: float, said: str
) -> None:
    won = pl.col("task_id") < f"game-{solved:04d}"
    rung = episodes.filter(policy="always_low").with_columns(
        policy=pl.lit("always_int4"), kind=pl.lit("rung"), success=won, reward=won.cast(pl.Float64), cost=pl.lit(cost)
    )
    metrics = compute_metrics(
        pl.concat([episodes, rung]),
        recipe="tiny",
        route=ROUTE,
        high="always_high",
        low="always_low",
        headline="kl_router",
    )
    assert not said or f"always_int4 wins {said} ({solved}.0% at {cost:.2f})." in headline(metrics)[1]
    for text in (" ".join(headline(metrics)), markdown_table(metrics)):
        assert ("always_int4 wins" in text) == bool(said)


def test_headline_and_note_say_the_gain_over_single_precisions(metrics: Metrics, episodes: pl.DataFrame) -> None:
    low, high = (100 * end for end in metrics["policies"]["kl_router"]["gain_ci95"])
    gain = f"+20.0 points (interval {low:+.1f} to {high:+.1f}) against static policies and mixtures of them."
    assert headline(metrics)[1] == f"At its cost of 0.50 it is {gain}"
    assert f"Chosen on validation: kl_router, {gain}" in markdown_table(metrics)


@pytest.fixture
def graded(episodes: pl.DataFrame) -> Metrics:
    """The same successes; who fails gets half of the reward."""
    rewards = episodes.with_columns(reward=pl.when("success").then(1.0).otherwise(0.5))
    return compute_metrics(
        rewards, recipe="tiny", route=ROUTE, high="always_high", low="always_low", headline="kl_router"
    )


def test_scores_are_shown_where_rewards_are_graded(graded: Metrics, metrics: Metrics, tmp_path: Path) -> None:
    """Out of 100, beside the success. Where a reward is 0 or 1 there is no word of them (see the tables' own tests)."""
    low, high = (100 * end for end in graded["policies"]["kl_router"]["score_ci95"])
    shown = f"92.5 [{low:.1f}, {high:.1f}]"
    table = markdown_table(graded)
    assert "| policy | success | score | high-precision ratio | cost (weights + cache) |" in table
    assert f" | {shown} | 40.0% |" in next(line for line in table.splitlines() if line.startswith("| **kl_router**"))
    assert "Score: mean reward times 100." in table
    sentence = f"is 92.5 (interval {low:.1f} to {high:.1f}); always_high's is 95.0, always_low's 75.0."
    assert sentence in " ".join(headline(graded))

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(console_table(graded))
    text = console.export_text()
    assert "…" not in text
    assert "92.5" in next(line for line in text.splitlines() if line.strip().startswith("kl_router *"))

    folder = tmp_path / "evaluation_report"
    folder.mkdir()
    for name, content in (("graded", graded), ("metrics", metrics)):
        (folder / "metrics.json").write_text(json.dumps(content))
        words = render(folder).text
        assert (shown in words) == (name == "graded")
        assert (" score " in words.replace("Wilson score", "")) == (name == "graded")


def test_markdown_table_holds_the_metrics(metrics: Metrics) -> None:
    lines = markdown_table(metrics).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][3:] == ["cost (weights + cache)", "tokens read", "steps",
                           "passes a step (drafts taken)", "gap recovered", "gain at equal cost",
                           "parse failures", "inadmissible"]  # fmt: skip
    assert {len(row) for row in rows} == {11}
    assert [row[0].strip("*") for row in rows[2:]] == list(metrics["policies"])
    interval = metrics["policies"]["kl_router"]["ci95"]
    assert rows[5][0] == "**kl_router**"
    assert rows[5][1] == f"85.0% [{interval[0] * 100:.1f}, {interval[1] * 100:.1f}]"
    assert rows[5][2:5] == ["40.0%", "0.500 (0.375 + 0.125)", "100"]
    low, high = metrics["policies"]["kl_router"]["gain_ci95"]
    assert rows[5][5:] == ["10.0", "4.0", rows[5][7], f"+20.0 [{low * 100:.0f}, {high * 100:.0f}]", "0.0%", "10.0%"]
    assert rows[5][7].startswith("88% [")
    assert rows[2][7:9] == ["-", "+0.0 [0, 0]"]


def test_failures_are_told_by_policy_and_in_the_html_by_class(folder: Path, episodes: pl.DataFrame) -> None:
    failing = pl.when(policy="always_low").then(pl.lit(4)).otherwise(pl.lit(0))
    rows = episodes.with_columns(unfinished=failing, no_thought=failing // 2).cast(episodes.schema)
    metrics = compute_metrics(
        rows, recipe="tiny", route=ROUTE, high="always_high", low="always_low", headline="kl_router"
    )
    low = next(line for line in markdown_table(metrics).splitlines() if line.startswith("| always_low"))
    assert low.endswith(" | 60.0% | 10.0% |")
    assert "Parse failures: share of the steps whose action" in markdown_table(metrics)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(console_table(metrics))
    text = console.export_text()
    assert "60.0%" in next(line for line in text.splitlines() if line.strip().startswith("always_low"))
    assert max(map(len, text.splitlines())) <= 80
    (folder / "metrics.json").write_text(json.dumps(metrics))
    words = render(folder).text
    assert "share of the steps parse failures unfinished no thought empty inadmissible always_high 0.0%" in words
    assert "always_low 60.0% 40.0% 20.0% 0.0% 10.0%" in words


def test_a_precision_that_only_checks_is_told_with_its_passes(folder: Path, episodes: pl.DataFrame) -> None:
    names = {"high": "always_high", "low": "always_low", "headline": "kl_router"}
    metrics = compute_metrics(with_checked(episodes), recipe="tiny", route=ROUTE, **names)
    (row,) = (line for line in markdown_table(metrics).splitlines() if line.startswith("| speculative:float<int2-mse"))
    assert "| 10.0 | 1.2 (90%) |" in row
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert "10.0 1.2 (90%) 2.0" in render(folder).text
    assert "speculative:A<B Precision A acts throughout, and only checks" in render(folder).text
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(console_table(metrics))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "speculative:float" in text


def test_planned_tests_are_corrected_and_told_everywhere(folder: Path, metrics: Metrics) -> None:
    """Random routing and always-low, the only single precision that costs no more; high wins five games more of 100."""
    words = " ".join(headline(metrics))
    assert "That it is less than 5 points worse than always_high is not shown (lower end -11.2)." in words
    assert "Against always_low, the best static policy that costs no more, it is better in the paired test" in words
    rows = metrics["paired"]
    assert [row["p_holm"] is None for row in rows] == [False, False, True]
    seen = rows[1]["smallest_difference"] * 100
    told = f"always_low +35.0 (p < 0.001; could have seen {seen:.1f})."
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(console_table(metrics))
    for text in (markdown_table(metrics), " ".join(console.export_text().split())):
        assert "Planned tests, points against (Holm; 80% power): random@kl_router" in text
        assert told in text
    page = render(folder).text
    assert "p p, Holm could have seen, points better / equal / worse" in page
    assert "The highlighted rows, 2 in number, are the tests that were planned" in page
    high = f"kl_router against always_high -5.0 [-10.0 to -1.0] 0.062 – {rows[2]['smallest_difference'] * 100:.1f} 0 / 95 / 5"
    assert high in page


def test_a_difference_that_is_not_shown_is_told_with_what_could_have_been(metrics: Metrics) -> None:
    pair = metrics["paired"][0]
    pair["p_value"], pair["p_holm"], pair["smallest_difference"] = 0.03, 0.06, 0.075
    text = " ".join(headline(metrics))
    assert "no difference is shown: " in text
    assert "p = 0.060) in the paired test; these games could have shown 7.5." in text
    assert "these games could have shown none." in " ".join(
        headline({**metrics, "paired": [{**pair, "smallest_difference": None}, *metrics["paired"][1:]]})
    )
    metrics["non_inferiority"] = {"margin": 0.002, "lower": 0.0, "games_needed": 1843, "shown": False}
    assert "(lower end +0.0; 100 games are too few for that, 1843 are needed)" in " ".join(headline(metrics))


@pytest.mark.parametrize("width", [80, 100])
def test_console_table_fits_and_cuts_nothing(metrics: Metrics, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(console_table(metrics))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    line = next(line for line in text.splitlines() if line.strip().startswith("kl_router *"))
    assert "85.0% [" in line
    assert "40.0%" in line
    assert "0.500" in line


def test_the_headline_of_three_rungs_tells_the_share_of_each(metrics_of_three: Metrics) -> None:
    text = " ".join(headline(metrics_of_three))
    mixed = "with float at 30.0%, int4 at 40.0%, int2 at 30.0% of the steps, 12.15 bits a weight in the mean"
    assert f"acting {mixed}; always_high succeeds in 90.0%, always_low in 50.0%." in text
    assert f"Against random routing ({mixed}) it is better in the paired test" in text
    assert "high precision" not in text


def test_the_markdown_table_of_three_rungs_has_a_column_for_each(metrics_of_three: Metrics) -> None:
    lines = markdown_table(metrics_of_three).splitlines()
    columns, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")
    ]
    acting = ["steps at float", "steps at int4", "steps at int2", "mean bits"]
    assert columns[:7] == ["policy", "success", *acting, "cost (weights + cache)"]
    found = {row[0].strip("*"): row[2:6] for row in rows}
    assert list(found) == list(metrics_of_three["policies"])
    assert found["kl_router"] == found["random@kl_router"] == ["30.0%", "40.0%", "30.0%", "12.15"]
    assert found["always_high"] == ["100.0%", "0.0%", "0.0%", "32.00"]
    assert found["always_int4"] == ["0.0%", "100.0%", "0.0%", "4.50"]
    assert found["always_low"] == ["0.0%", "0.0%", "100.0%", "2.50"]


def test_the_console_table_says_what_its_columns_are(metrics: Metrics, metrics_of_three: Metrics) -> None:
    for found, said in (
        (
            metrics,
            "*: chosen on validation. Ratio: steps at float. Gap: won back of what always_low loses to always_high.",
        ),
        (metrics_of_three, "*: chosen on validation. Bits: a weight, mean of the steps' precisions. Gap:"),
    ):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(console_table(found))
        assert said in " ".join(console.export_text().split())


def test_the_console_table_of_three_rungs_fits_and_tells_the_mean_bits(metrics_of_three: Metrics) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(console_table(metrics_of_three))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert next(line for line in lines if "policy" in line).split() == [
        "policy", "success", "bits", "cost", "gap", "fails", "gain",
    ]  # fmt: skip
    line = next(line for line in lines if line.strip().startswith("kl_router *"))
    assert " 12.15 " in line
    assert " 0.500 " in line


def test_the_html_of_three_rungs_has_a_column_for_each(folder: Path, metrics_of_three: Metrics) -> None:
    two = render(folder).text
    assert "high-precision steps" in two
    assert "steps at" not in two
    assert "High precision exactly where the two greedy actions differ; it needs both at every step, so" in two
    (folder / "metrics.json").write_text(json.dumps(metrics_of_three))
    page = render(folder)
    assert headline(metrics_of_three)[0] in page.text
    assert "steps at float steps at int4 steps at int2 mean bits cost" in page.text
    assert "30.0% 40.0% 30.0% 12.15 0.500" in page.text
    assert "0.0% 100.0% 0.0% 4.50 0.400" in page.text
    assert (
        "The cheapest precision whose greedy action is that of the dearest; it needs them all at every step, so"
        in page.text
    )
    for word in ("high-precision steps", "high-precision tokens", "high-precision ratio", "the two greedy"):
        assert word not in page.text


def test_html_from_metrics_alone(folder: Path, metrics: Metrics) -> None:
    page = render(folder)
    for name in metrics["policies"]:
        assert name in page.text
    assert headline(metrics)[0] in page.text
    assert "Measured time" not in page.text
    assert "The precision ladder" not in page.text


def test_html_shows_all_that_the_folder_holds(folder: Path, metrics: Metrics, tmp_path: Path) -> None:
    context = {
        "recipe": {"benchmark": {"splits": {"test": 100}}},
        "ladder": [
            {
                "name": "int2",
                "bits_per_weight": 2.5,
                "bytes": 820_000,
                "kl_to_float": 0.61,
                "success_validation": 0.585,
                "cost_validation": 0.25,
                "dominated_by": "int4",
            }
        ],
        "verdict": {"pays": False, "text": "Deploy <int2>.", "deploy": "int2", "route": ["float", "int2"]},
        "kl_router": {"auroc": 0.8712},
        "grpo_router": {"best_update": 49},
        "sensitivity": {"steps": 21044},
        "notes": ["A note of its own."],
    }
    (folder / "context.json").write_text(json.dumps(context))
    (folder / "manifest.json").write_text(
        json.dumps({"stage": "evaluation_report", "code_version": "7", "inputs": {"kl_router": "0123abcd.dir"}})
    )
    sidecar = tmp_path / "run.json"
    times = {"kl_router": {"mean": 0.00421, "p95": 0.0098, "router_share": 0.125}}
    sidecar.write_text(json.dumps({"measured": {"seconds_per_step": times}}))

    page = render(folder, sidecar)
    for text in (
        "On validation games, before any router: Deploy <int2>. The routers below choose between float and int2 all the same.",
        "Highlighted: the precision to deploy without a router.",
        "always_low 0.200 [0.200, 0.200] +0.0 [+0.0 to +0.0] on the line",
        "int2 2.50 0.82 0.6100 58.5% 0.250 int4",
        "kl_router 4.21 9.80 12.5%",
        "auroc 0.8712",
        "best update 49",
        "steps 21,044",
        "A note of its own.",
        "splits.test 100",
        "input kl_router 0123abcd.dir",
    ):
        assert text in page.text


def test_curves_are_shown_with_their_rule_and_its_test(folder: Path, metrics: Metrics, episodes: pl.DataFrame) -> None:
    assert curves_table(metrics) == ""
    assert " Curves " not in render(folder).text
    metrics = with_curves(
        compute_metrics(
            with_rule(episodes), recipe="tiny", route=ROUTE, high="always_high", low="always_low", headline="kl_router"
        )
    )
    (folder / "metrics.json").write_text(json.dumps(metrics))
    page = render(folder)
    for said in (
        "margin 80.0 (19.0%; 0.60)",
        "+4.1 [-1.2, +9.4]",
        "rule@kl_router: margin at 0.4.",
        "Against margin, the best rule that costs no more on validation games, it is better",
    ):
        assert said in page.text, said
    table = curves_table(metrics)
    assert "| **kl_router** | 82.0% (0.60) | 84.0% (0.80) | 0.800 [0.70, 0.90] | 15.0% | 35.0% | 0.750 |" in table


def test_html_needs_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.json"):
        render_html(tmp_path, None, tmp_path / "report.html")
