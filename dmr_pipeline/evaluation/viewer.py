"""The test games that the report's viewer can show, packed into the page.

A game's texts (observations, commands) are listed once, and steps name them by their place. All is one JSON text, compressed,
which the page unpacks itself.
"""

import base64
import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from dmr_pipeline.evaluation.results import Metrics

MOST_BYTES = 2_000_000
"""Of the games, each compressed alone."""


class Shown(NamedTuple):
    """What the page holds of the games."""

    packed: str
    """Gzip of the JSON, in base64."""
    games: int
    of: int
    """Games that there are."""
    differing: int
    """Of those shown, games that not all of the policies won, and not all lost."""


def viewer(metrics: Metrics, folder: Path, most_bytes: int = MOST_BYTES) -> Shown:
    """As many games as there is room for, those first that some policies won and others lost.

    Args:
        folder: artifact of the stage `evaluation_report`.
    """
    steps = pl.read_parquet(folder / "transcripts.parquet")
    names = [name for name in metrics["policies"] if name in set(steps["policy"])]
    episodes = pl.read_parquet(folder / "episodes.parquet").filter(pl.col("policy").is_in(names), draw=0)
    games = _games(
        steps,
        episodes,
        pl.read_parquet(folder / "openings.parquet"),
        pl.read_parquet(folder / "choices.parquet"),
        metrics,
    )
    outcomes = episodes.group_by("task_id").agg(pl.col("success").n_unique())
    differing = set(outcomes.filter(pl.col("success") > 1)["task_id"])
    chosen: list[dict[str, Any]] = []
    used = 0
    for game in sorted(games, key=lambda game: game["id"] not in differing):
        used += len(zlib.compress(_json(game)))
        if used > most_bytes and chosen:
            break
        chosen.append(game)
    page = {
        "policies": [{"name": name, "kind": metrics["policies"][name]["kind"]} for name in names],
        "headline": metrics["headline"],
        "high": metrics["high"],
        "low": metrics["low"],
        "route": metrics["route"],
        "games": chosen,
    }
    packed = base64.b64encode(gzip.compress(_json(page), mtime=0)).decode("ascii")
    return Shown(packed, len(chosen), len(games), sum(game["id"] in differing for game in chosen))


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
