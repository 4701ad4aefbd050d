"""Policies tuned to budgets on validation games, in closed loop: routers and rules alike."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import polars as pl
from pydantic import JsonValue
from rich.progress import Progress, TaskID

from dmr_pipeline.environments.base import Task
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.play import Arena, Entry, evaluate
from dmr_pipeline.precision.hull import Floats
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.policy import RoutingPolicy
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.budgets import NOBODY, AtBar, Bar, Lot, bar_at, find_bars

_SHARES = tuple(tenth / 10 for tenth in range(11))
"""Of the levels that a bar is below, where a cost is asked for."""
_MIXED = 0.3
"""Ratio at which levels are met there."""


@dataclass(frozen=True)
class Tunable:
    """A policy that a bar decides for."""

    name: str
    kind: str
    """As in `Entry`."""
    policy: RoutingPolicy
    """As `AtBar` wants it."""
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)
    """All that tells it from others of its name, but for the bar."""
    router: PassBytes | None = None
    """As in `Entry`."""

    def at(self, bar: Bar, arena: Arena) -> Entry:
        shown: dict[str, JsonValue] = {**asdict(bar)}
        policy = AtBar(self.policy, arena.rollouts.route, bar, arena.seed)
        return Entry(self.name, self.kind, policy, {**self.parameters, "bar": shown}, router=self.router)


@dataclass(frozen=True)
class Tuned:
    """A policy at the bar that a budget has led to, and the validation games that it has played there."""

    bar: Bar
    played: pl.DataFrame
    """Rows of `PLAYED`."""


@dataclass(frozen=True)
class Range:
    """Validation games to tune on, and how they are played."""

    arena: Arena
    games: Sequence[Task]
    progress: Progress
    kept: KeptTables
    """Under all that episodes depend on but for the policy: the games, how many of them, and who acts."""
    known: Known
    mode: Bar = NOBODY
    """Of which `sample` and `strict` are taken."""

    def play(self, tunable: Tunable, bar: Bar) -> pl.DataFrame:
        """Rows of `PLAYED`."""
        entry, shown = tunable.at(self.in_mode(bar), self.arena), self.progress.task_ids
        played = evaluate([entry], self.arena, self.games, self.progress, " on validation", self.kept, self.known)
        self._hide_but(shown)
        return played[tunable.name]

    def in_mode(self, bar: Bar) -> Bar:
        return replace(bar, sample=self.mode.sample, strict=self.mode.strict)

    def levels(self, tunable: Tunable, ratio: float) -> Floats:
        """The levels that it gives the steps at which it may be asked, while dearer rungs act at this share of them, by lot: so
        all policies meet the same transcripts, and states much like those that they will meet at such a budget."""
        entry = tunable.at(Lot(0.0, ties=ratio), self.arena)
        facts: dict[str, JsonValue] = {
            "levels of": entry.name,
            "kind": entry.kind,
            "parameters": dict(entry.parameters),
        }
        found = self.kept.read(**facts)
        if found is None:
            runs = [RolloutRequest(game) for game in self.games]
            shown = self.progress.task_ids
            bar = self.progress.add_task(f"levels of {tunable.name}", total=len(runs))
            played = self.arena.rollouts.play(
                runs, entry.policy, self.arena.seed, None, lambda n: self.progress.advance(bar, n), self.known
            )
            steps = (step for trajectory in played for step in trajectory.steps if not step.forced)
            found = pl.DataFrame({"level": [level for step in steps for level in step.exceedance]})
            self._hide_but(shown)
            self.kept.write(found, **facts)
        levels: Floats = found["level"].cast(pl.Float64).to_numpy()
        return levels if len(levels) else np.zeros(1)

    def _hide_but(self, shown: Sequence[TaskID]) -> None:
        """Many rollouts follow one another: bars that are full go."""
        for task in set(self.progress.task_ids) - set(shown):
            self.progress.remove_task(task)


def tune_to_ratios(tunable: Tunable, on: Range, ratios: Sequence[float], close_enough: float = 0.01) -> list[Tuned]:
    """At the bar whose spend (of two rungs the high-precision ratio) is the largest that is at most each of these.

    Args:
        ratios: in the order in which they are looked for; what was played for one narrows the search for the next.
        close_enough: as in `find_bars`.
    """
    levels, frames = on.levels(tunable, ratios[len(ratios) // 2]), dict[Bar, pl.DataFrame]()

    def play_at(bar: Bar) -> float:
        frames[bar] = on.play(tunable, bar)
        return spend_of(frames[bar])

    found = find_bars(play_at, levels, ratios, on.mode.sample, close_enough)
    return [Tuned(on.in_mode(point.bar), frames[point.bar]) for point in found]


def tune_to_cost(tunable: Tunable, on: Range, cost: float) -> tuple[Tuned | None, float]:
    """At the bar with which most games are won for a mean cost of at most this, the cheapest of equals; None if there is none.
    Cost need not rise with the ratio (an agent that errs takes more steps), so eleven bars are tried, a tenth of the levels
    apart.

    Returns:
        Beside it, the least mean cost that was met.
    """
    levels, met = on.levels(tunable, _MIXED), list[Tuned]()
    for share in _SHARES:
        bar = on.in_mode(bar_at(levels, 1 - share, on.mode.sample))
        if all(bar != tried.bar for tried in met):
            met.append(Tuned(bar, on.play(tunable, bar)))
    within = [tuned for tuned in met if mean_of(tuned.played, "cost") <= cost]
    least = min(mean_of(tuned.played, "cost") for tuned in met)
    best = max(within, key=lambda t: (mean_of(t.played, "success"), -mean_of(t.played, "cost")), default=None)
    return best, least


def spend_of(played: pl.DataFrame) -> float:
    """Mean over all steps, of rows of `PLAYED`."""
    return float(played["spend"].sum()) / float(played["steps"].sum())


def mean_of(played: pl.DataFrame, column: str) -> float:
    """Over episodes."""
    return float(played[column].cast(pl.Float64).mean())  # type: ignore[arg-type]
