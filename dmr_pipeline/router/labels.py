"""Labels of steps: how far the precisions' action distributions diverge on the same prefix.

Each cheaper routed rung is compared with the dearest: of the two, that one is called low here, and the dearest high.

Choices that the paper leaves open, and ours: the action distributions are compared along the high-precision greedy action
(teacher forcing both precisions on its tokens), over every token of it up to and including its end, or (`sensitivity.tokens:
command`) over those after its thought; a divergence of a step is the sum of the tokens' divergences over the full vocabulary.
By the chain rule that is the part of the divergence between the two distributions over whole actions that lies on the path high
precision takes. Where the precisions have one cache, each goes on from what those had read before the step that acted in the
played episode. With more than two rungs a step's class is the cheapest rung that is not sensitive there, else the dearest.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import polars as pl
import torch
from torch import Tensor

from dmr_pipeline.agent.memory import in_pieces
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.sensitivity import Sensitivity
from dmr_pipeline.rollout.choosing import leads
from dmr_pipeline.rollout.kv_cache.catching_up import catch_up
from dmr_pipeline.rollout.kv_cache.padded import TokenStreams
from dmr_pipeline.rollout.kv_cache.shared import SharedStreams
from dmr_pipeline.rollout.parallel import in_processes, scatter
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.writing import Guess, NgramGuesses, write

T = TypeVar("T")

STEPS = pl.Schema(
    {
        "episode_id": pl.String,
        "task_id": pl.String,
        "task_type": pl.String,
        "policy": pl.String,
        "turn": pl.Int64,
        "precision": pl.String,
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
"""One row a step and cheaper routed rung, `precision`. Divergences in nats. `entropy_low` (nats, summed) and
`margin_low` (smallest gap between the two likeliest tokens' probabilities) are those of low precision along its own
greedy action. `success` is the episode's outcome."""

DRAFTS = pl.Schema(
    {
        "episode_id": pl.String(),
        "turn": pl.Int64(),
        "precision": pl.String(),
        "action": pl.List(pl.Int64),
        "margin": pl.Float64(),
        "mean_margin": pl.Float64(),
    }
)
"""One row a step and routed rung, dearest first: the greedy action that it would take there, as token ids, and the least and the
mean lead in probability of the likeliest token over the next, over all of its tokens."""

_MOST_LOGITS = 2**27
"""Held at once, of one precision: 512 MB. A comparison holds those of whole actions."""


class _Transcript(NamedTuple):
    """Token ids of the segment and of the action of each step of an episode, and the rung that acted."""

    name: str
    segments: list[list[int]]
    actions: list[list[int]]
    acted: list[str]


_Batch = Sequence[_Transcript]
"""Episodes that are measured at once, the longest first."""
_Rows = tuple[list[tuple[object, ...]], list[tuple[object, ...]]]
"""Of the two tables of `Measured`."""


@dataclass(frozen=True)
class Divergence:
    """A cheaper precision and the dearest, at one step."""

    kl_high_low: float
    kl_low_high: float
    js: float
    greedy_agree: bool
    entropy_low: float
    margin_low: float


class GreedyAction(NamedTuple):
    """A precision's greedy action: the columns of `DRAFTS`."""

    action: list[int]
    margin: float
    mean_margin: float

    @classmethod
    def of(cls, action: list[int], leads: Sequence[float]) -> "GreedyAction":
        return cls(action, min(leads), math.fsum(leads) / len(leads))


class Compared(NamedTuple):
    """All rungs at one step."""

    divergences: dict[str, Divergence]
    """By cheaper rung."""
    drafts: dict[str, GreedyAction]
    """By rung, dearest first."""


class Measured(NamedTuple):
    steps: pl.DataFrame
    """The columns of STEPS but `sensitive`, in the order of the steps that were measured."""
    drafts: pl.DataFrame
    """`DRAFTS`, in the same order."""


def measure(
    rollouts: Rollouts,
    episodes: pl.DataFrame,
    steps: pl.DataFrame,
    counted: Literal["action", "command"],
    on_progress: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Divergences of every step of these trajectories, and what every rung would have done there.

    Args:
        counted: what divergences are summed over, as in `compare`.
        on_progress: called with the number of steps that have just been measured.
    """
    prompter = rollouts.prompter
    most = max(1, _MOST_LOGITS // (len(prompter.tokenizer) * prompter.prompt.max_action_tokens))
    context = episodes.select("episode_id", "task_id", "task_type", "policy", "success")

    def compare_episodes(episodes: _Batch, on_progress: Callable[[int], None]) -> list[_Rows]:
        rows, drafts = list[tuple[object, ...]](), list[tuple[object, ...]]()
        streams, guesses = rollouts.streams(len(episodes)), NgramGuesses()
        texts: list[list[int]] = [[] for _ in episodes]
        trails = [bytearray() for _ in episodes]
        readers = {rung: bytes([reader]) for reader, rung in enumerate(streams)}
        for turn in range(len(episodes[0].segments)):
            running = [i for i, episode in enumerate(episodes) if turn < len(episode.segments)]
            for first in range(0, len(running), most):
                live = running[first : first + most]
                for i in live:
                    if turn:  # the last token of an action is read with what follows
                        texts[i] += episodes[i].actions[turn - 1]
                        trails[i] += readers[episodes[i].acted[turn - 1]] * (len(texts[i]) - 1 - len(trails[i]))
                    texts[i] += episodes[i].segments[turn]
                done, held = [episodes[i].actions[turn] for i in live], [trails[i] for i in live]
                compared = compare(streams, live, [texts[i] for i in live], prompter, counted, done, guesses, held)
                rows += [
                    (episodes[i].name, turn, rung, *vars(divergence).values())
                    for i, its in zip(live, compared, strict=True)
                    for rung, divergence in its.divergences.items()
                ]
                drafts += [
                    (episodes[i].name, turn, rung, *draft)
                    for i, its in zip(live, compared, strict=True)
                    for rung, draft in its.drafts.items()
                ]
                on_progress(len(live))
        return [(rows, drafts)]

    def compare_batches(batches: Sequence[_Batch], on_progress: Callable[[int], None]) -> list[_Rows]:
        rows: list[_Rows] = []
        for batch in batches:
            rows += in_pieces(batch, len(batch), "episodes", partial(compare_episodes, on_progress=on_progress))
        return rows

    # Lists, since polars does not survive the fork into several processes.
    batches: list[_Batch] = [
        [_Transcript(*columns) for columns in batch.select("episode_id", "segment", "action", "precision").iter_rows()]
        for batch in longest_first(steps).iter_slices(rollouts.rows)
    ]
    found = list(chain(*in_processes(compare_batches, scatter(batches, rollouts.processes), on_progress)))
    rows, drafted = (list(chain(*parts)) for parts in zip(*found, strict=True))
    columns = {name: STEPS[name] for name in ("episode_id", "turn", "precision", *Divergence.__dataclass_fields__)}
    measured = pl.DataFrame(rows, schema=columns, orient="row").join(context, on="episode_id")
    drafts = pl.DataFrame(drafted, schema=DRAFTS, orient="row")
    ordered = (
        steps.select("episode_id", "turn").join(
            table, on=["episode_id", "turn"], how="left", maintain_order="left_right"
        )
        for table in (measured, drafts)
    )
    of_steps, of_drafts = ordered
    return Measured(of_steps.select([name for name in STEPS if name != "sensitive"]), of_drafts)


def longest_first(steps: pl.DataFrame) -> pl.DataFrame:
    """A row an episode, those of the most steps first: `episode_id`, its steps' `segment`, `action` and `precision` as lists, and
    their number, `turns`."""
    return (
        steps.group_by("episode_id", maintain_order=True)
        .agg("segment", "action", "precision", turns=pl.len())
        .sort(["turns", "episode_id"], descending=[True, False])
    )


def compare(
    streams: Mapping[str, TokenStreams],
    slots: Sequence[int],
    texts: Sequence[list[int]],
    prompter: Prompter,
    tokens: Literal["action", "command"] = "action",
    recorded: Sequence[list[int]] | None = None,
    guesses: NgramGuesses | None = None,
    trails: Sequence[bytearray] | None = None,
) -> list[Compared]:
    """Let all rungs read the texts, and compare what they would do next. Their streams are left with what they did.

    The dearest writes its greedy action, and each cheaper one is taken along it. Where that would write another token, it is
    then taken back to that place and goes on alone, for its entropy and its margin.

    Args:
        streams: by rung, dearest first.
        tokens: of the actions, what is counted: all, or those after the thought. An action whose thought does not end has none.
        recorded: what was done next, a good guess at what any would do. Not more than that: it changes no outcome.
        guesses: used beside it, and taught.
        trails: who has read the first tokens of each text, as in `SharedStreams.catch_up`, where streams are such. Every rung
            reads the rest itself.
    """
    recorded = recorded or [[] for _ in slots]
    guesses = guesses or NgramGuesses()
    most = prompter.prompt.max_action_tokens

    def next_of(i: int, written: list[int]) -> list[int]:
        if recorded[i][: len(written)] == written:
            return recorded[i][len(written) :]
        return guesses.guess(texts[i], written, most - len(written) - 1)

    def guess(waiting: Mapping[int, list[int]]) -> dict[int, list[int]]:
        return {i: next_of(i, written) for i, written in waiting.items()}

    def unread(rung: str) -> list[list[int]]:
        if isinstance(streams, SharedStreams):
            return streams.catch_up(rung, slots, texts, trails or [b""] * len(slots))
        return catch_up(streams[rung], slots, texts)

    dearest, *cheaper = streams
    high = write(streams[dearest], slots, unread(dearest), _greedy, list, guess, prompter.is_complete)
    high_logits = torch.stack([row for action in high for row in action.facts])
    high_actions = [action.tokens for action in high]

    def counted_from(action: list[int]) -> int:
        if tokens == "action" or prompter.prompt.thought_end is None:
            return 0
        return prompter.thought_length(action) or len(action)

    high_drafts = map(GreedyAction.of, high_actions, _split(leads(high_logits), map(len, high_actions)))
    found = [Compared({}, {dearest: draft}) for draft in high_drafts]
    taught = [[action] for action in high_actions]
    for rung in cheaper:
        along = _along(streams[rung], slots, texts, unread(rung), high_actions, high_logits, guess, prompter)
        for place, (high_action, low) in enumerate(zip(high_actions, along, strict=True)):
            high_from, low_from = counted_from(high_action), counted_from(low.action)
            high_low, low_high, js = (max(0.0, math.fsum(column)) for column in _columns(low.between[high_from:], 3))
            entropies, margins = _columns(low.own[low_from:], 2)
            agree = high_action[high_from:] == low.action[low_from:]
            found[place].drafts[rung] = GreedyAction.of(low.action, [lead for _, lead in low.own])
            found[place].divergences[rung] = Divergence(
                high_low, low_high, js, agree, math.fsum(entropies), min(margins, default=1.0)
            )
            taught[place].append(low.action)
    for text, actions in zip(texts, taught, strict=True):
        for action in actions:
            guesses.learn(text, action)
    return found


@dataclass(frozen=True)
class _Along:
    """A cheaper precision taken along the dearest's action."""

    action: list[int]
    """Its own greedy action."""
    own: list[tuple[float, float]]
    """Entropy and margin at each token of that."""
    between: list[tuple[float, float, float]]
    """Divergences at each token of the dearest's action."""


def _along(
    streams: TokenStreams,
    slots: Sequence[int],
    texts: Sequence[list[int]],
    unread: Sequence[list[int]],
    high_actions: Sequence[list[int]],
    high_logits: Tensor,
    guess: Guess,
    prompter: Prompter,
) -> list[_Along]:
    """Arguments as in `compare`, one a slot."""
    sizes = [len(action) for action in high_actions]
    along = [left + action[:-1] for left, action in zip(unread, high_actions, strict=True)]
    low_logits = streams.extend(slots, along, sizes)
    between = token_divergences(high_logits, low_logits)
    own, choices = own_numbers(low_logits), _greedy(low_logits, None)

    actions, numbers = [], []
    for action, chosen, measured in zip(high_actions, _split(choices, sizes), _split(own, sizes), strict=True):
        apart = next((n for n, token in enumerate(chosen) if token != action[n]), len(chosen) - 1)
        actions.append(chosen[: apart + 1])
        numbers.append(measured[: apart + 1])
    alone = [i for i in range(len(slots)) if not prompter.is_complete(actions[i])]
    for i in alone:
        streams.truncate(slots[i], len(texts[i]) + len(actions[i]) - 1)

    def guess_alone(waiting: Mapping[int, list[int]]) -> dict[int, Sequence[int]]:
        guessed = guess({alone[place]: written for place, written in waiting.items()})
        return {place: guessed[alone[place]] for place in waiting}

    rest = write(
        streams,
        [slots[i] for i in alone],
        [actions[i][-1:] for i in alone],
        _greedy,
        own_numbers,
        guess_alone,
        prompter.is_complete,
        begun=[actions[i] for i in alone],
    )
    for i, written in zip(alone, rest, strict=True):
        actions[i] = written.tokens
        numbers[i] = numbers[i] + written.facts
    return [_Along(*parts) for parts in zip(actions, numbers, _split(between, sizes), strict=True)]


def _greedy(logits: Tensor, _: object) -> list[int]:
    return list(logits.argmax(-1).tolist())


def token_divergences(high: Tensor, low: Tensor) -> list[tuple[float, float, float]]:
    """KL(high||low), KL(low||high) and Jensen-Shannon divergence in nats of each row of logits [n, vocabulary]."""
    p, q = high.double().log_softmax(-1), low.to(high.device).double().log_softmax(-1)
    mixture = torch.logaddexp(p, q) - math.log(2)
    js = (_kl(p, mixture) + _kl(q, mixture)) / 2
    return list(zip(_kl(p, q).tolist(), _kl(q, p).tolist(), js.tolist(), strict=True))


def own_numbers(logits: Tensor) -> list[tuple[float, float]]:
    """Entropy in nats of each row of logits [n, vocabulary], and how far its likeliest token leads the next in probability."""
    p = logits.double().log_softmax(-1)
    best = p.exp().topk(2, dim=-1).values
    return list(zip((-(p.exp() * p).sum(-1)).tolist(), (best[:, 0] - best[:, 1]).tolist(), strict=True))


def threshold(rows: pl.DataFrame, section: Sensitivity) -> float:
    """Tau in nats, given or a quantile of all rows: of every step with each cheaper rung."""
    if section.tau is not None:
        return section.tau
    value = rows[divergence_column(section)].quantile(section.quantile or 0.0, interpolation="linear")
    assert value is not None
    return float(value)


def label(rows: pl.DataFrame, section: Sensitivity, tau: float) -> pl.DataFrame:
    """A rung is sensitive at a step where its divergence is at least tau (the paper's label) and, with `won_only` (ours), the
    episode was won."""
    sensitive = pl.col(divergence_column(section)) >= tau
    return rows.with_columns(sensitive=sensitive & pl.col("success") if section.won_only else sensitive).select(
        STEPS.names()
    )


def read_sensitivity(folder: Path) -> pl.DataFrame:
    """The labelled steps, checked again on reading.

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


def read_drafts(folder: Path) -> pl.DataFrame:
    """What every routed rung would have done at these steps, checked again on reading.

    Raises:
        UserError: other columns than there should be, missing values, or NaN.
    """
    path = folder / "drafts.parquet"
    table = pl.read_parquet(path)
    if table.schema != DRAFTS:
        raise UserError(f"{path}: its columns are {dict(table.schema)}, expected {dict(DRAFTS)}; make it anew")
    if sum(table.null_count().row(0)) or any(table.select(pl.col(pl.Float64).is_nan().any()).row(0)):
        raise UserError(f"{path}: missing values or NaN; make it anew")
    return table


def step_classes(table: pl.DataFrame, route: Sequence[str]) -> pl.DataFrame:
    """For each step of a labelled table the rung that it asks for, in steps up from the cheapest routed one: the cheapest that is
    not sensitive, else the dearest.

    Returns:
        Columns `episode_id`, `turn` and `rung` (Int64), in the table's order of steps.
    """
    up = {rung: place for place, rung in enumerate(reversed(route))}
    rung = pl.col("precision").replace_strict(up, return_dtype=pl.Int64)
    fits = rung.filter(~pl.col("sensitive")).min().fill_null(len(route) - 1)
    return table.group_by("episode_id", "turn", maintain_order=True).agg(rung=fits)


def divergence_column(section: Sensitivity) -> str:
    """The one of `STEPS` that the labels go by."""
    return "js" if section.direction == "js" else f"kl_{section.direction}"


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence [n] of log-probabilities [n, vocabulary]."""
    return (p.exp() * (p - q)).sum(-1)


def _split(values: Iterable[T], sizes: Iterable[int]) -> list[list[T]]:
    """The values in runs of these sizes."""
    left = iter(values)
    return [list(islice(left, size)) for size in sizes]


def _columns(rows: Sequence[tuple[float, ...]], count: int) -> list[list[float]]:
    return [[row[column] for row in rows] for column in range(count)]
