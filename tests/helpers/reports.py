"""A made-up artifact of the stage `evaluation_report`, with all that its page shows."""

import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from dmr_pipeline.evaluation.figures import figures
from dmr_pipeline.evaluation.metrics import compute_metrics
from dmr_pipeline.evaluation.results import Metrics
from dmr_pipeline.evaluation.transcripts import CHOICES, OPENINGS, SHOWN, TRANSCRIPTS
from tests.helpers.evaluations import ROUTE, with_curves

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">&amp;"
"""What a game could say."""


def metrics_of(episodes: pl.DataFrame, route: Sequence[str] = ROUTE) -> Metrics:
    names = {"high": "always_high", "low": "always_low", "headline": "kl_router"}
    return with_curves(compute_metrics(episodes, recipe="tiny", route=route, **names))


def kl_of(game: int, turn: int) -> float:
    """Highest in game 37, at turn 4."""
    return round(1 / (1 + abs(game - 37) + abs(turn - 4)), 4)


def write_report(folder: Path, episodes: pl.DataFrame, hostile: str = HOSTILE, route: Sequence[str] = ROUTE) -> Metrics:
    """The artifact of these episodes. The router's probability is `turn / 10`; where it is 0.5 or more the dearest rung acts, and
    else the next one; cheaper ones would give another command at odd turns."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = metrics_of(episodes, route)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    episodes.with_columns(outgrown=pl.lit(False)).write_parquet(folder / "episodes.parquet")
    shown = episodes.filter(pl.col("kind").is_in(SHOWN), draw=0)
    rows, would = [], []
    for policy, task, count in shown.select("policy", "task_id", "steps").iter_rows():
        game = int(task.removeprefix("game-"))
        for turn in range(count):
            dear = policy == "always_high" or (policy != "always_low" and turn >= 5)
            level = turn / 10 if policy == "kl_router" else float(dear)
            said = f"{policy} sees {hostile} at {turn}"
            rows.append(
                (policy, turn, f"go to shelf {turn}", said, route[not dear], [level, *[1.0] * (len(route) - 2)], task)
            )
            if policy == "kl_router":
                other = f"go to shelf {turn}" if turn % 2 == 0 else f"take <b>{turn}</b>"
                would += [(policy, task, turn, rung, other, 0.8, kl_of(game, turn)) for rung in route[:0:-1]]
                would.append((policy, task, turn, route[0], f"go to shelf {turn}", 0.9, None))
    pl.DataFrame(rows, schema=TRANSCRIPTS, orient="row").write_parquet(folder / "transcripts.parquet")
    pl.DataFrame(would, schema=CHOICES, orient="row").write_parquet(folder / "choices.parquet")
    tasks = shown.filter(policy="kl_router").select("task_id", "task_type")
    told = tasks.with_columns(
        instruction=pl.format("solve {} " + hostile, "task_id"), opening=pl.lit(f"A room. {hostile}")
    )
    told.select(OPENINGS.names()).write_parquet(folder / "openings.parquet")
    (folder / "context.json").write_text(json.dumps({"kl_router": {"threshold": 0.5}}))
    (folder / "figures.json").write_text(json.dumps(figures_of_logs()))
    return metrics


def figures_of_logs() -> dict[str, object]:
    sensitivity = pl.DataFrame(
        {"turn": [0, 0, 1, 1], "kl_high_low": [0.1, 0.3, 0.0, 1.0], "sensitive": [False, True, False, True]}
    )
    kl_log = pl.DataFrame({"update": range(1, 501), "loss": [1 / update for update in range(1, 501)]})
    numbers = ("reward", "success", "ratio", "cost", "tied_groups", "divergence")
    grpo_log = pl.DataFrame({"update": [0, 1, 2], **{name: [None, 0.5, 0.6] for name in numbers}}).with_columns(
        **{f"validation_{name}": pl.Series([0.4, None, 0.5]) for name in ("reward", "success", "ratio", "cost")}
    )
    calibration = pl.DataFrame(
        {"probability": [i / 100 for i in range(100)], "sensitive": [i % 3 == 0 for i in range(100)]}
    )
    return dict(figures(sensitivity, kl_log, grpo_log, calibration))
