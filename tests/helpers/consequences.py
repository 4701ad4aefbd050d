"""Labelled steps whose predictors are known."""

import numpy as np
import polars as pl

from dmr_pipeline.router.consequence import CONSEQUENCES, label_of


def labelled_steps(
    needed: np.ndarray, kl: np.ndarray, per_game: int = 10, probability: float | None = None
) -> pl.DataFrame:
    """Steps of games that differ in nothing but KL and the label; where it is not needed, both win."""
    n = len(needed)
    columns = {
        "episode_id": [f"p/{i // per_game}/0" for i in range(n)],
        "task_id": [str(i // per_game) for i in range(n)],
        "task_type": ["even" if i // per_game % 2 == 0 else "odd" for i in range(n)],
        "policy": ["p"] * n,
        "success": [True] * n,
        "turn": [i % per_game for i in range(n)],
        "acted": ["low"] * n,
        "probability": [probability] * n,
        "precision": ["low"] * n,
        **dict.fromkeys(("kl_high_low", "kl_low_high", "js", "entropy_low"), kl),
        "greedy_agree": [False] * n,
        "margin_low": [0.5] * n,
        "continuation": ["low"] * n,
        **{f"{side}_{name}": [1] * n for side in ("high", "low") for name in ("steps", "tokens", "cost")},
        "high_success": [True] * n,
        "low_success": ~needed,
        "label": ["?"] * n,
    }
    frame = pl.DataFrame({name: columns[name] for name in CONSEQUENCES}, schema=CONSEQUENCES, strict=False)
    return frame.with_columns(label=label_of())
