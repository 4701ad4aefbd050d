"""How a router would have done on episodes that another policy has played: off-policy evaluation.

The log tells with which probability each precision that acted was chosen. An episode's weight is the product, over its steps, of
the target's probability of what acted over the logged one. The self-normalised estimate is the weighted mean of the outcomes
(Swaminathan and Joachims, 2015). The doubly robust one (Jiang and Li, 2016) adds to a model of what is still to come, step by
step, the weighted error of that model: it is right where either is, and steadier where the model is good. The model is ours:
ridge regression of the outcome on a few numbers of the step, on games that it was not fitted on. Both say nothing where the log
never took what the target would: that is refused, and so is an effective number of episodes, (sum of weights)^2 / sum of their
squares, that is too small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmr_pipeline.errors import UserError
from dmr_pipeline.router.budgets import Bar

Floats = NDArray[np.float64]

LEAST_EPISODES = 20.0
"""Effective ones."""
_FOLDS = 5
_RIDGE = 1.0
_RESAMPLES = 1000
_SURE = 1e-9


@dataclass(frozen=True)
class LoggedRun:
    """One episode of the log. `steps` are those that somebody decided: none that was forced, or at which a router failed."""

    game: str
    taken: NDArray[np.int64]
    """Place in the route of what acted: [steps]."""
    propensity: Floats
    """With which that was chosen: [steps]."""
    target: Floats
    """The target's probability of each rung: [steps, rungs]."""
    numbers: Floats
    """What the model goes by besides the rung: [steps, numbers]."""
    outcome: float

    @property
    def ratios(self) -> Floats:
        """Of the target's probability of what acted and the logged one: [steps]."""
        return self.target[np.arange(len(self.taken)), self.taken] / self.propensity


class Interval(NamedTuple):
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    episodes: int
    effective: float
    """Episodes that would tell as much had the target played them itself."""
    logged: float
    """Mean outcome of the log."""
    self_normalised: Interval
    doubly_robust: Interval


def chances_at(bar: Bar, levels: Sequence[float], route: Sequence[str], steps: int, dearer: int) -> dict[str, float]:
    """Rung -> the chance that this bar takes it (`budgets.AtBar`); those without any are left out.

    Args:
        levels: `Decision.exceedance`.
        steps: of the episode so far.
        dearer: those of them that were not the cheapest rung's.
    """
    if bar.is_used_up(steps, dearer):
        return {route[-1]: 1.0}
    chances, above = dict[str, float](), 0.0
    for rung, chance in zip(route, [*map(bar.chance, levels), 1.0], strict=True):
        if chance > above:
            chances[rung] = chance - above
            above = chance
    return chances


def estimate(runs: Sequence[LoggedRun], confidence: float = 0.95, seed: int = 0) -> Estimate:
    """The mean outcome that the target would have; intervals by resampling games.

    Raises:
        UserError: the log does not tell.
    """
    if not any(run.taken.size for run in runs):
        raise UserError("no logged episode tells its propensities: serve with --epsilon, and post outcomes")
    _refuse_what_was_never_tried(runs)
    weights = np.array([run.ratios.prod() for run in runs])
    effective = float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0
    if effective < LEAST_EPISODES:
        raise UserError(
            f"the log's {len(runs)} episodes tell as much as {effective:.1f} of the target's own, and {LEAST_EPISODES:.0f} are"
            " needed: log more episodes, or serve with a larger --epsilon"
        )
    outcomes = np.array([run.outcome for run in runs])
    values = _doubly_robust(runs, seed)
    games = np.unique([run.game for run in runs], return_inverse=True)[1]

    def of(rows: NDArray[np.int64]) -> tuple[float, float]:
        total = weights[rows].sum()
        snips = (weights[rows] * outcomes[rows]).sum() / total if total > 0 else np.nan
        return float(snips), float(values[rows].mean())

    found = of(np.arange(len(runs)))
    rng, rows_of = np.random.default_rng(seed), [np.flatnonzero(games == game) for game in range(games.max() + 1)]
    drawn = np.array(
        [
            of(np.concatenate([rows_of[game] for game in rng.integers(len(rows_of), size=len(rows_of))]))
            for _ in range(_RESAMPLES)
        ]
    )
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    snips, robust = (Interval(found[i], float(low[i]), float(high[i])) for i in range(2))
    return Estimate(len(runs), effective, float(outcomes.mean()), snips, robust)


def _refuse_what_was_never_tried(runs: Sequence[LoggedRun]) -> None:
    """A step at which the log drew nothing, and the target might have done otherwise."""
    total = sum(len(run.taken) for run in runs)
    untried = sum(int(((run.propensity > 1 - _SURE) & (_agreeing(run) < 1 - _SURE)).sum()) for run in runs)
    if untried:
        raise UserError(
            f"at {untried:,} of {total:,} logged steps nothing was drawn, and this router may decide otherwise there: what would"
            " have come of it the log cannot tell; serve with --epsilon, and sessions without budgets"
        )


def _agreeing(run: LoggedRun) -> Floats:
    chosen: Floats = run.target[np.arange(len(run.taken)), run.taken]
    return chosen


def _doubly_robust(runs: Sequence[LoggedRun], seed: int) -> Floats:
    """Of each episode: what it adds to the mean."""
    games = sorted({run.game for run in runs})
    fold_of = dict(zip(games, np.random.default_rng(seed).permutation(len(games)) % _FOLDS, strict=True))
    models = {fold: _fitted([run for run in runs if fold_of[run.game] != fold]) for fold in set(fold_of.values())}
    return np.array([_value_of(run, models[fold_of[run.game]]) for run in runs])


def _value_of(run: LoggedRun, model: Callable[[Floats], Floats]) -> float:
    """From the last step back: value <- V(step) + ratio * (value - Q(step, taken)), where V is Q's mean under the target."""
    rungs = run.target.shape[1]
    of_rung = np.stack([model(_columns(run.numbers, np.full(len(run.taken), k), rungs)) for k in range(rungs)], axis=1)
    expected = (run.target * of_rung).sum(axis=1)
    of_taken = of_rung[np.arange(len(run.taken)), run.taken]
    value = run.outcome
    for t in range(len(run.taken) - 1, -1, -1):
        value = expected[t] + run.ratios[t] * (value - of_taken[t])
    return float(value)


def _fitted(runs: Sequence[LoggedRun]) -> Callable[[Floats], Floats]:
    """Ridge regression of the outcome; its mean where there is nothing to fit on."""
    if not runs:
        return lambda columns: np.zeros(len(columns))
    rungs = runs[0].target.shape[1]
    columns = np.concatenate([_columns(run.numbers, run.taken, rungs) for run in runs])
    outcome = np.concatenate([np.full(len(run.taken), run.outcome) for run in runs])
    penalty = _RIDGE * np.eye(columns.shape[1])
    penalty[0, 0] = 0.0
    solved = np.linalg.lstsq(columns.T @ columns + penalty, columns.T @ outcome, rcond=None)[0]
    return lambda wanted: np.asarray(wanted @ solved, np.float64)


def _columns(numbers: Floats, taken: NDArray[np.int64], rungs: int) -> Floats:
    """One, the numbers, the rung, and the rung times the numbers."""
    chosen = np.eye(rungs)[taken][:, 1:]
    crossed = (chosen[:, :, None] * numbers[:, None, :]).reshape(len(numbers), chosen.shape[1] * numbers.shape[1])
    return np.concatenate([np.ones((len(numbers), 1)), numbers, chosen, crossed], axis=1)
