"""Numbers that cost nothing, for a probe to decide on beside hidden states or instead of them: about the episode so far, and,
where the router decides after it, about the cheapest rung's draft.

Acting and training count with the same code (`Past`), acting as it goes, training over recorded steps with the greedy drafts of
`sensitivity_dataset`. The turn is always told (probe.py), and with it the share of the step limit that is left. A state is what
the transcript has grown by: where the prompt tells the step's number none is ever met again. All of it is ours. The names:

- `repeats`: how often this state was met before, and how often the last command had been issued before (log(1 + n) each).
- `behind`: for every routed rung the tokens of the transcript since it last acted, log(1 + n).
- `margin`: how far the likeliest token led the next in the last action, by the precision that acted: the least lead.
- `draft`: of the draft, the least lead and the mean one, and its tokens / 10.
- `draft_repeats`: how often the drafted command was issued before, log(1 + n), and whether it was at this very state.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log1p
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dmr_pipeline.recipe.kl_router import Feature

OF_DRAFTS = frozenset({"draft", "draft_repeats"})
"""Features that there are only after the draft."""


class Drafted(NamedTuple):
    """What the cheapest rung would do."""

    command: str
    tokens: int
    margin: float
    """The least lead of the likeliest token, in probability."""
    mean_margin: float


@dataclass
class Past:
    """An episode so far, as far as it is known for nothing."""

    route: Sequence[str]
    _states: Counter[tuple[int, ...]] = field(default_factory=Counter)
    _commands: Counter[str] = field(default_factory=Counter)
    _both: set[tuple[tuple[int, ...], str]] = field(default_factory=set)
    _last: str | None = None
    _held: int = 0
    """Tokens of the transcript, the present segment aside."""
    _seen: dict[str, int] = field(default_factory=dict)
    """Those of them that a rung had read, once it had last acted: all but the last token of its action."""

    def act(self, segment: Sequence[int], command: str, precision: str, tokens: int) -> None:
        """A step has been taken.

        Args:
            tokens: of its action.
        """
        state = tuple(segment)
        self._states[state] += 1
        self._commands[command] += 1
        self._both.add((state, command))
        self._last = command
        self._held += len(segment) + tokens
        self._seen[precision] = self._held - 1

    def numbers(
        self, features: Sequence[Feature], segment: Sequence[int], margin: float, draft: Drafted | None
    ) -> list[float]:
        """At the next step, the features' numbers in their order.

        Args:
            margin: of the last action; 1 where there is none.
            draft: given where a feature is one of `OF_DRAFTS`.
        """
        state = tuple(segment)

        def of(feature: Feature) -> list[float]:
            if feature == "repeats":
                before = 0 if self._last is None else self._commands[self._last] - 1
                return [log1p(self._states[state]), log1p(before)]
            if feature == "behind":
                return [log1p(self._held + len(segment) - self._seen.get(rung, 0)) for rung in self.route]
            if feature == "margin":
                return [margin]
            assert draft is not None
            if feature == "draft":
                return [draft.margin, draft.mean_margin, draft.tokens / 10]
            return [log1p(self._commands[draft.command]), float((state, draft.command) in self._both)]

        return [number for feature in features for number in of(feature)]


def width_of(features: Sequence[Feature], rungs: int) -> int:
    """How many numbers they are."""
    widths = {"repeats": 2, "behind": rungs, "margin": 1, "draft": 3, "draft_repeats": 2}
    return sum(widths[feature] for feature in features)


def numbers_of_steps(
    features: Sequence[Feature],
    route: Sequence[str],
    steps: pl.DataFrame,
    drafts: pl.DataFrame,
    command: Callable[[list[int]], str],
) -> list[NDArray[np.float32]]:
    """What an acting router would have been told at recorded steps: for each episode, in their order, [steps, numbers].

    The margin of a step's action is that of the greedy action of the rung that acted.

    Args:
        route: the rungs, dearest first.
        steps: `rollout.tables.STEPS`, by episode and turn.
        drafts: `labels.DRAFTS`, of these steps.
        command: in an action's tokens.
    """
    found: dict[tuple[str, int], Mapping[str, tuple[list[int], float, float]]] = {}
    for episode, turn, rung, *its in drafts.select("episode_id", "turn", "precision", *DRAFTED).iter_rows():
        found.setdefault((episode, turn), {})[rung] = tuple(its)  # type: ignore[index]
    rows: list[NDArray[np.float32]] = []
    columns = ("episode_id", "turn", "segment", "action", "command", "precision")
    for episode in steps.select(columns).partition_by("episode_id", maintain_order=True):
        past, margin, numbers = Past(route), 1.0, []
        for episode_id, turn, segment, action, issued, precision in episode.iter_rows():
            there = found[episode_id, turn]
            tokens, least, mean = there[route[-1]]
            draft = Drafted(command(tokens), len(tokens), least, mean)
            numbers.append(past.numbers(features, segment, margin, draft))
            past.act(segment, issued, precision, len(action))
            margin = there[precision][1]
        rows.append(np.array(numbers, np.float32))
    return rows


DRAFTED = ("action", "margin", "mean_margin")
"""Columns of `labels.DRAFTS`."""
