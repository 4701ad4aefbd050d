import base64
import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dmr_pipeline.evaluation.report import render_html, script_json
from dmr_pipeline.evaluation.results import Metrics
from dmr_pipeline.evaluation.viewer import MOST_BYTES, asked, seen_in
from tests.helpers.evaluations import THREE
from tests.helpers.reports import HOSTILE, write_report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "evaluation_report"


@pytest.fixture
def metrics(folder: Path, episodes: pl.DataFrame) -> Metrics:
    return write_report(folder, episodes)


def unpacked(packed: str) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_the_page_holds_every_step_as_it_was_played(folder: Path, metrics: Metrics) -> None:
    shown = seen_in(folder, metrics)
    page = unpacked(shown.packed)
    assert (shown.games, shown.of, shown.differing) == (100, 100, 40)
    assert [policy["name"] for policy in page["policies"]] == ["always_high", "always_low", "kl_router", "disagreement"]
    steps = pl.read_parquet(folder / "transcripts.parquet")
    found = []
    for game in page["games"]:
        texts = game["texts"]
        assert len(set(texts)) == len(texts)
        assert texts[game["opening"]] == f"A room. {HOSTILE}"
        assert texts[game["task"]] == f"solve {game['id']} {HOSTILE}"
        for policy, episode in game["episodes"].items():
            for turn, (command, observation, rung, exceedance) in enumerate(episode["steps"]):
                of_step = (texts[command], texts[observation], page["route"][rung], exceedance)
                found.append((policy, turn, *of_step, game["id"]))
    assert (
        pl.DataFrame(found, schema=steps.schema, orient="row")
        .sort("policy", "task_id", "turn")
        .equals(steps.sort("policy", "task_id", "turn"))
    )


def test_outcomes_and_choices_are_those_of_the_tables(folder: Path, metrics: Metrics, episodes: pl.DataFrame) -> None:
    page = unpacked(seen_in(folder, metrics).packed)
    told = {
        (policy, game["id"]): (its["won"], its["cost"], its["switches"], len(its["steps"]))
        for game in page["games"]
        for policy, its in game["episodes"].items()
    }
    rows = episodes.filter(pl.col("policy").is_in([policy for policy, _ in told]))
    assert told == {
        (policy, task): tuple(rest)
        for policy, task, *rest in rows.select("policy", "task_id", "success", "cost", "switches", "steps").iter_rows()
    }
    choices = pl.read_parquet(folder / "choices.parquet")
    game = next(game for game in page["games"] if game["id"] == "game-0037")
    for turn, rungs in enumerate(game["would"]):
        rows = choices.filter(task_id="game-0037", turn=turn).sort("precision")
        assert [(game["texts"][command], *rest) for command, *rest in rungs] == [
            *rows.select("command", "margin", "kl_high_low").iter_rows()
        ]


def test_where_room_is_short_games_with_different_outcomes_come_first(folder: Path, metrics: Metrics) -> None:
    all_games = seen_in(folder, metrics)
    few = seen_in(folder, metrics, most_bytes=30_000)
    assert 0 < few.games < 100
    assert few.differing == few.games
    some = seen_in(folder, metrics, most_bytes=60_000)
    assert few.games < some.games < all_games.games
    assert len(base64.b64decode(some.packed)) < 60_000


def test_the_page_is_one_small_file_that_no_text_of_a_game_can_break(
    folder: Path, metrics: Metrics, tmp_path: Path
) -> None:
    render_html(folder, None, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 5_000_000 - MOST_BYTES * 4 / 3
    assert "document.title='broken'" not in text
    assert (
        text.count("<script") == text.count("</script>") == 5
    )  # data of charts and games; Vega, Vega-Lite and our own
    for name, policy in metrics["policies"].items():
        assert f'"series":"{name}","success":{policy["success"]}' in text


def test_json_in_a_page_cannot_end_its_element() -> None:
    content = {"text": "</script><!-- & \u2028"}
    written = script_json(content)
    assert "<" not in written
    assert json.loads(written) == content


def test_how_often_high_precision_acted_where_the_precisions_differ(folder: Path, metrics: Metrics) -> None:
    """The router's ten turns: float acts from turn 5 on; the precisions differ at the odd ones."""
    steps = pl.read_parquet(folder / "transcripts.parquet")
    sentence = asked(metrics, steps, pl.read_parquet(folder / "choices.parquet"))
    assert sentence.startswith(
        "At 500 of kl_router's 1,000 steps the precisions would give different commands (50.0%)."
    )
    assert sentence.endswith("float acted at 60.0% of these, and at 40.0% of the others.")


def test_of_three_precisions_each_tells_what_it_would_do_in_the_order_of_the_route(
    of_three: pl.DataFrame, tmp_path: Path
) -> None:
    folder = tmp_path / "evaluation_report"
    metrics = write_report(folder, of_three, route=THREE)
    page = unpacked(seen_in(folder, metrics).packed)
    assert page["route"] == list(THREE)
    assert page["thresholds"] == {"kl_router": 0.5}
    game = page["games"][0]
    shown = [[game["texts"][command] for command, *_ in rungs] for rungs in game["would"][:2]]
    assert shown == [["go to shelf 0"] * 3, ["go to shelf 1", "take <b>1</b>", "take <b>1</b>"]]
    assert [kl for _, _, kl in game["would"][0]].count(None) == 1
    assert game["would"][0][0][2] is None
    assert {rung for *_, rung, _ in game["episodes"]["kl_router"]["steps"]} == {0, 1}
    render_html(folder, None, tmp_path / "report.html")
    assert "Across spend: cheapest precision 0%, dearest 100%" in (tmp_path / "report.html").read_text(encoding="utf-8")
