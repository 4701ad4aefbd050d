"""The test games that the report's viewer can show, packed into the page.

A game's texts (observations, commands) are listed once, and steps name them by their place. All is one JSON text, compressed,
which the page unpacks itself.
"""

import base64
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from dmr_pipeline.evaluation.results import Metrics

MOST_BYTES = 2_000_000
"""Of the games, each compressed alone."""


class Seen(NamedTuple):
    """What the page shows of the steps."""

    packed: str
    """Gzip of the JSON, in base64."""
    games: int
    of: int
    """Games that there are."""
    differing: int
    """Of those shown, games that not all of the policies won, and not all lost."""
    turns: list[dict[str, Any]]
    """Rows of `turns`."""
    sentences: list[str]


def seen_in(folder: Path, metrics: Metrics, most_bytes: int = MOST_BYTES) -> Seen:
    """As many games as there is room for, those first that some policies won and others lost.

    Args:
        folder: artifact of the stage `evaluation_report`.
    """
    steps = pl.read_parquet(folder / "transcripts.parquet")
    names = [name for name in metrics["policies"] if name in set(steps["policy"])]
    episodes = pl.read_parquet(folder / "episodes.parquet").filter(pl.col("policy").is_in(names), draw=0)
    choices = pl.read_parquet(folder / "choices.parquet")
    games = _games(steps, episodes, pl.read_parquet(folder / "openings.parquet"), choices, metrics)
    outcomes = episodes.group_by("task_id").agg(pl.col("success").n_unique())
    differing = set(outcomes.filter(pl.col("success") > 1)["task_id"])
    chosen: list[dict[str, Any]] = []
    used = 0
    for game in sorted(games, key=lambda game: game["id"] not in differing):
        size = len(zlib.compress(_json(game)))
        if used + size <= most_bytes or not chosen:
            used += size
            chosen.append(game)
    page = {
        "policies": [{"name": name, "kind": metrics["policies"][name]["kind"]} for name in names],
        "headline": metrics["headline"],
        "thresholds": _thresholds(folder, names),
        "high": metrics["high"],
        "low": metrics["low"],
        "route": metrics["route"],
        "games": chosen,
    }
    packed = base64.b64encode(gzip.compress(_json(page), mtime=0)).decode("ascii")
    return Seen(
        packed,
        len(chosen),
        len(games),
        sum(game["id"] in differing for game in chosen),
        turns(metrics, steps).to_dicts(),
        [asked(metrics, steps, choices)],
    )


def _thresholds(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """What a router's probability is compared with, of those whose stages tell it."""
    path = folder / "context.json"
    context = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = {name: context[name] for name in names if name in context}
    return {name: its["threshold"] for name, its in facts.items() if isinstance(its.get("threshold"), float)}


def turns(metrics: Metrics, steps: pl.DataFrame) -> pl.DataFrame:
    """For each router (`series`) and turn the share of the steps at which the dearest precision acted (`ratio`), its mean
    `probability`, the `steps`, and as a share of the games those that are still `running`.

    Args:
        steps: rows of `transcripts.TRANSCRIPTS`.
    """
    routers = [name for name, policy in metrics["policies"].items() if policy["kind"] == "router"]
    return (
        steps.filter(pl.col("policy").is_in(routers))
        .group_by(pl.col("policy").alias("series"), "turn", maintain_order=True)
        .agg(
            ratio=(pl.col("precision") == metrics["route"][0]).mean(),
            probability=pl.col("exceedance").list.first().mean(),
            steps=pl.len(),
        )
        .with_columns(running=pl.col("steps") / metrics["policies"][metrics["headline"]]["n"])
        .sort("series", "turn")
    )


def asked(metrics: Metrics, steps: pl.DataFrame, choices: pl.DataFrame) -> str:
    """How often the dearest precision acted where the precisions would give different commands, and where they would not.

    Args:
        steps: rows of `transcripts.TRANSCRIPTS`.
        choices: rows of `transcripts.CHOICES`, of the headline router.
    """
    place = ["task_id", "turn"]
    differ = choices.group_by(place).agg(differ=pl.col("command").n_unique() > 1)
    mine = steps.filter(policy=metrics["headline"]).join(differ, on=place)
    dearest = pl.col("precision") == metrics["route"][0]
    counts = {apart: rows.select(pl.len(), dearest.sum()).row(0) for (apart,), rows in mine.group_by("differ")}
    (apart, there), (same, elsewhere) = counts.get(True, (0, 0)), counts.get(False, (0, 0))
    return (
        f"At {apart:,} of {metrics['headline']}'s {apart + same:,} steps the precisions would give different commands"
        f" ({apart / max(apart + same, 1):.1%}). {metrics['route'][0]} acted at {there / max(apart, 1):.1%} of these, and at"
        f" {elsewhere / max(same, 1):.1%} of the others."
    )


def _games(
    steps: pl.DataFrame, episodes: pl.DataFrame, openings: pl.DataFrame, choices: pl.DataFrame, metrics: Metrics
) -> list[dict[str, Any]]:
    route = metrics["route"]
    played = dict(steps.sort("turn").group_by("task_id", "policy", maintain_order=True))
    would = {key[0]: rows for key, rows in choices.group_by("task_id", maintain_order=True)}
    ended = {(row["task_id"], row["policy"]): row for row in episodes.iter_rows(named=True)}
    found = []
    for opening in openings.iter_rows(named=True):
        texts: dict[str, int] = {}

        def place(text: str, texts: dict[str, int] = texts) -> int:
            return texts.setdefault(text, len(texts))

        game: dict[str, Any] = {
            "id": opening["task_id"],
            "type": opening["task_type"],
            "task": place(opening["instruction"]),
            "opening": place(opening["opening"]),
            "episodes": {
                policy: _episode(played[task, policy], ended[task, policy], route, place)
                for policy in metrics["policies"]
                if (task := opening["task_id"], policy) in played
            },
        }
        if (rows := would.get(opening["task_id"])) is not None:
            game["would"] = [
                [
                    [place(row["command"]), row["margin"], row["kl_high_low"]]
                    for row in turn.sort(pl.col("precision").replace_strict(route, range(len(route)))).iter_rows(
                        named=True
                    )
                ]
                for _, turn in rows.sort("turn").group_by("turn", maintain_order=True)
            ]
        found.append(game | {"texts": list(texts)})
    return found


def _episode(steps: pl.DataFrame, ended: Mapping[str, Any], route: list[str], place: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "won": ended["success"],
        "reward": ended["reward"],
        "cost": ended["cost"],
        "switches": ended["switches"],
        "outgrown": ended["outgrown"],
        "steps": [
            [place(command), place(observation), route.index(precision), exceedance]
            for command, observation, precision, exceedance in steps.select(
                "command", "observation", "precision", "exceedance"
            ).iter_rows()
        ],
    }


def _json(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
