"""Stage `sensitivity_dataset`: one row a step, with what both precisions would have done on the same prefix.

Choices that the paper leaves open, and ours: the action distributions are compared along the high-precision greedy action
(teacher forcing both precisions on its tokens), over every token of it up to and including its end; a divergence of a step is
the sum of the tokens' divergences over the full vocabulary. By the chain rule that is the part of the divergence between the
two distributions over whole actions that lies on the path high precision takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import polars as pl
import torch
from rich.progress import Progress
from torch import Tensor

from dmr_pipeline.agent.memory import in_pieces
from dmr_pipeline.agent.prompts import Prompter
from dmr_pipeline.agent.streams import TokenStreams
from dmr_pipeline.errors import UserError
from dmr_pipeline.ladder import Ladder
from dmr_pipeline.parallel import deal, in_processes
from dmr_pipeline.recipe import Sensitivity
from dmr_pipeline.stage import StageContext, StageResult
from dmr_pipeline.trajectories import read_all_trajectories

STEPS = pl.Schema(
    {
        "episode_id": pl.String,
        "task_id": pl.String,
        "task_type": pl.String,
        "policy": pl.String,
        "turn": pl.Int64,
        "kl_high_low": pl.Float64,
        "kl_low_high": pl.Float64,
        "js": pl.Float64,
        "greedy_agree": pl.Boolean,
        "entropy_low": pl.Float64,
        "margin_low": pl.Float64,
        "success": pl.Boolean,
        "sensitive": pl.Boolean,
    }
)
"""Divergences in nats. `entropy_low` (nats, summed) and `margin_low` (smallest gap between the two likeliest tokens'
probabilities) are those of low precision along its own greedy action. `success` is the episode's outcome."""


class _Transcript(NamedTuple):
    """Token ids of the segment and of the action of each step of an episode."""

    name: str
    segments: list[list[int]]
    actions: list[list[int]]


_Batch = Sequence[_Transcript]
"""Episodes that are measured at once, the longest first."""


@dataclass(frozen=True)
class Divergence:
    """Both precisions at one step."""

    kl_high_low: float
    kl_low_high: float
    js: float
    greedy_agree: bool
    entropy_low: float
    margin_low: float


def sensitivity_dataset(context: StageContext) -> StageResult:
    recipe = context.recipe
    torch.set_num_threads(recipe.runtime.threads)
    ladder = Ladder.load(context.inputs["quantized_checkpoints"], recipe)
    given = read_all_trajectories(context.inputs, ladder.prompter, recipe.precisions.high, ladder.capacity)
    with Progress() as progress:
        bar = progress.add_task("divergence of the precisions", total=len(given.episodes))
        rows = measure(ladder, given.episodes, given.steps, ladder.rows, lambda n: progress.advance(bar, n))
    tau = threshold(rows, recipe.sensitivity)
    table = label(rows, recipe.sensitivity, tau)
    table.write_parquet(context.output / "steps.parquet")
    late = pl.col("turn") >= 10
    return StageResult(
        summary={
            "steps": len(table),
            "ingested_steps": given.ingested_steps,
            "tau": tau,
            "direction": recipe.sensitivity.direction,
            "label_share": round(float(table["sensitive"].mean()), 5),  # type: ignore[arg-type]
            "greedy_disagreement": round(1 - float(table["greedy_agree"].mean()), 5),  # type: ignore[arg-type]
            "mean_kl_high_low": round(float(table["kl_high_low"].mean()), 5),  # type: ignore[arg-type]
            "label_share_before_turn_10": _share(table.filter(~late)),
            "label_share_from_turn_10": _share(table.filter(late)),
        }
    )


def measure(
    ladder: Ladder,
    episodes: pl.DataFrame,
    steps: pl.DataFrame,
    slots: int,
    advance: Callable[[int], None] = lambda _: None,
) -> pl.DataFrame:
    """Divergences of every step of these trajectories: the columns of STEPS but `sensitive`, in the steps' order."""
    transcripts = steps.group_by("episode_id", maintain_order=True).agg("segment", "action")
    context = episodes.select("episode_id", "task_id", "task_type", "policy", "success")
    longest_first = transcripts.with_columns(turns=pl.col("segment").list.len()).sort(
        ["turns", "episode_id"], descending=[True, False]
    )

    def compare_episodes(episodes: _Batch) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        streams = ladder.streams(len(episodes))
        for turn in range(len(episodes[0].segments)):
            live = [i for i, episode in enumerate(episodes) if turn < len(episode.segments)]
            new = [(episodes[i].actions[turn - 1] if turn else []) + episodes[i].segments[turn] for i in live]
            compared = compare(streams, live, new, ladder.prompter)
            rows += [(episodes[i].name, turn, *vars(found).values()) for i, found in zip(live, compared, strict=True)]
        return rows

    def compare_batches(batches: Sequence[_Batch], advance: Callable[[int], None]) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        for batch in batches:
            rows += in_pieces(batch, len(batch), "episodes", compare_episodes)
            advance(len(batch))
        return rows

    # Lists, since polars does not survive the fork into several processes.
    batches: list[_Batch] = [
        [_Transcript(*columns) for columns in batch.select("episode_id", "segment", "action").iter_rows()]
        for batch in longest_first.iter_slices(slots)
    ]
    rows = list(chain(*in_processes(compare_batches, deal(batches, ladder.processes), advance)))
    columns = {name: STEPS[name] for name in ("episode_id", "turn", *Divergence.__dataclass_fields__)}
    measured = pl.DataFrame(rows, schema=columns, orient="row").join(context, on="episode_id")
    return (
        steps.select("episode_id", "turn")
        .join(measured, on=["episode_id", "turn"], how="left", maintain_order="left")
        .select([name for name in STEPS if name != "sensitive"])
    )


def compare(
    streams: dict[bool, TokenStreams],
    slots: Sequence[int],
    chunks: Sequence[list[int]],
    prompter: Prompter,
) -> list[Divergence]:
    """Append the chunks to both precisions' streams, and compare what they would do next; the streams end there."""
    first = {high: streams[high].extend(slots, chunks) for high in (True, False)}
    lengths = [streams[True].lengths[slot] for slot in slots]
    high_actions, high_logits = _greedy(streams[True], slots, first[True], prompter)
    low_actions, low_own = _greedy(streams[False], slots, first[False], prompter)
    for high in (True, False):
        for slot, length in zip(slots, lengths, strict=True):
            streams[high].truncate(slot, length)
    forced = _forced(streams[False], slots, first[False], high_actions, lengths)
    return [
        divergence(high_logits[i], forced[i], low_own[i], high_actions[i] == low_actions[i]) for i in range(len(slots))
    ]


def divergence(high: Tensor, low: Tensor, low_own: Tensor, agree: bool) -> Divergence:
    """From logits [tokens of the high-precision action, vocabulary] of both, and low precision's along its own action."""
    p, q = high.double().log_softmax(-1), low.double().log_softmax(-1)
    own = low_own.double().log_softmax(-1)
    mixture = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=torch.double))
    best = own.exp().topk(2, dim=-1).values
    return Divergence(
        kl_high_low=_kl(p, q),
        kl_low_high=_kl(q, p),
        js=(_kl(p, mixture) + _kl(q, mixture)) / 2,
        greedy_agree=agree,
        entropy_low=-float((own.exp() * own).sum()),
        margin_low=float((best[:, 0] - best[:, 1]).min()),
    )


def threshold(rows: pl.DataFrame, section: Sensitivity) -> float:
    """Tau in nats, given or a quantile of all steps."""
    if section.tau is not None:
        return section.tau
    value = rows[divergence_column(section)].quantile(section.quantile or 0.0, interpolation="linear")
    assert value is not None
    return float(value)


def label(rows: pl.DataFrame, section: Sensitivity, tau: float) -> pl.DataFrame:
    """A step is sensitive where its divergence is at least tau (the paper's label) and, with `won_only` (ours), its
    episode was won."""
    sensitive = pl.col(divergence_column(section)) >= tau
    return rows.with_columns(sensitive=sensitive & pl.col("success") if section.won_only else sensitive).select(
        STEPS.names()
    )


def read_sensitivity(folder: Path) -> pl.DataFrame:
    """The dataset, checked again on reading.

    Raises:
        UserError: other columns than it should have, missing values, NaN, or negative divergences.
    """
    path = folder / "steps.parquet"
    table = pl.read_parquet(path)
    if table.schema != STEPS:
        raise UserError(f"{path}: its columns are {dict(table.schema)}, expected {dict(STEPS)}; make it anew")
    numbers = table.select(pl.col(pl.Float64))
    if sum(table.null_count().row(0)) or any(numbers.select(pl.all().is_nan().any()).row(0)):
        raise UserError(f"{path}: missing values or NaN; make it anew")
    if (table.select("kl_high_low", "kl_low_high", "js").min().transpose().to_series() < -1e-9).any():
        raise UserError(f"{path}: negative divergences; make it anew")
    return table


def divergence_column(section: Sensitivity) -> str:
    """The one of `STEPS` that the labels go by."""
    return "js" if section.direction == "js" else f"kl_{section.direction}"


def _kl(p: Tensor, q: Tensor) -> float:
    """KL divergence of log-probabilities [tokens, vocabulary], summed over tokens; rounding below 0 is cut off."""
    return max(0.0, float((p.exp() * (p - q)).sum()))


def _share(table: pl.DataFrame) -> float | None:
    return round(float(table["sensitive"].mean()), 5) if len(table) else None  # type: ignore[arg-type]


def _greedy(
    streams: TokenStreams, slots: Sequence[int], logits: Tensor, prompter: Prompter
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy actions from where the streams stand, and the logits that each of their tokens was chosen from."""
    actions: list[list[int]] = [[] for _ in slots]
    seen: list[list[Tensor]] = [[] for _ in slots]
    waiting = list(range(len(slots)))
    while waiting:
        for row, i in enumerate(waiting):
            seen[i].append(logits[row])
        for i, token in zip(waiting, logits.argmax(-1).tolist(), strict=True):
            actions[i].append(token)
        waiting = [i for i in waiting if not prompter.is_complete(actions[i])]
        if waiting:
            logits = streams.extend([slots[i] for i in waiting], [[actions[i][-1]] for i in waiting])
    return actions, [torch.stack(rows) for rows in seen]


def _forced(
    streams: TokenStreams, slots: Sequence[int], first: Tensor, actions: Sequence[list[int]], lengths: Sequence[int]
) -> list[Tensor]:
    """Logits for every token of the given actions; the streams are cut back to `lengths`."""
    logits = [first[i : i + 1] for i in range(len(slots))]
    longer = [i for i, action in enumerate(actions) if len(action) > 1]
    if longer:
        rest = streams.extend_all([slots[i] for i in longer], [actions[i][:-1] for i in longer])
        for i, rows in zip(longer, rest, strict=True):
            logits[i] = torch.cat([logits[i], rows])
            streams.truncate(slots[i], lengths[i])
    return logits
