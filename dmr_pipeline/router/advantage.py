"""What a dearer rung is worth at a step, learned from mixed episodes: the other target of stage 1.

The advantage tau_k(x) is the chance of success where rung k takes the step, minus that where the cheapest one does, and the
episode goes on at random precisions as the mixed behaviour does. While trajectories are collected every step's rung a is drawn
with known chances e_k, whatever the state x, so that the pseudo-outcome

    psi_k = (success - m(x)) (1[a = k] / e_k - 1[a = cheapest] / e_cheapest)

is tau_k(x) in the mean, and the least mean of w_k (psi_k - tau_k)^2 finds it, with w_k = e_k e_c / (e_k + e_c) (c: cheapest),
by which noisy ones count less. Of two rungs this is the R-learner (Nie and Wager, 2021; Robinson, 1988), the square of its
treatment's surprise at its mean. As the chances are known, any m(x) that does not look at the episode's own game leaves the
mean where it is, and a good one makes the noise small: here a ridge regression on what the router decides on, of other games.
The other estimator (`doubly_robust`) takes what is expected of each rung a by itself, mu_a(x), again from other games, and
corrects it by what came of those steps that the rung took (augmented inverse propensities: Robins, Rotnitzky and Zhao, 1994;
Kennedy, 2023):

    psi_k = mu_k(x) - mu_c(x) + 1[a = k] / e_k (success - mu_k(x)) - 1[a = c] / e_c (success - mu_c(x)), w_k = 1

It is tau_k(x) in the mean where either the chances or the expectations are right; here the chances always are.

Where rung k and the cheapest would take the same action nothing follows from who does: psi_k is 0 there, which takes most of
the noise away. (With one cache for all rungs that is our simplification.)

A router's margin of rung k is tau_k, and its threshold a price in success. All of this is ours: the paper's labels are
divergences.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmr_pipeline.errors import UserError
from dmr_pipeline.router.calibration import chances
from dmr_pipeline.router.kl import games_of
from dmr_pipeline.router.model import RoutingSequence

Floats = NDArray[np.float64]

Estimator = Literal["r_learner", "doubly_robust"]

_FOLDS = 5
_RIDGE = 0.01
"""Of a mean squared error, features standardised."""
_NEVER = 1e-9
"""Chances below it are none."""


def mixed(steps: pl.DataFrame, played: pl.DataFrame) -> pl.DataFrame:
    """The steps of episodes in which rungs were drawn.

    Args:
        steps: `rollout.tables.STEPS`.
        played: `rollout.tables.EPISODES` of those that were played here: what is logged of ingested ones is a router's belief,
            and no chance.

    Raises:
        UserError: there are none.
    """
    drawn = pl.col("exceedance").list.eval((pl.element() > 0) & (pl.element() < 1)).list.any()
    found = steps.join(played.select("episode_id"), on="episode_id", how="semi", maintain_order="left").filter(
        drawn.any().over("episode_id")
    )
    if found.is_empty():
        raise UserError(
            "kl_router.target: advantage learns from episodes in which rungs are drawn at each step, and there are none; add such"
            " a policy to trajectories.behaviour"
        )
    return found


def targets(
    steps: pl.DataFrame,
    episodes: pl.DataFrame,
    drafts: pl.DataFrame,
    route: Sequence[str],
    sequences: Sequence[RoutingSequence],
    seed: int,
    estimator: Estimator = "r_learner",
) -> list[Tensor]:
    """For each episode of the steps, in their order, float32 [steps, 2, rungs - 1]: psi and w of all rungs but the cheapest,
    cheapest first; both 0 where one of the two rungs is never drawn.

    Args:
        steps: as `mixed` gives them.
        drafts: `labels.DRAFTS`, of these steps.
        sequences: of these episodes.
        seed: of the folds.
    """
    success = dict(episodes.select("episode_id", "success").iter_rows())
    sizes = [len(s.acted) for s in sequences]
    outcomes = steps["episode_id"].replace_strict(success, return_dtype=pl.Float64).to_numpy()
    fold = folds(games_of(steps, episodes), sizes, seed)
    inputs = np.concatenate([_inputs(s) for s in sequences])
    above = np.array(steps["exceedance"].to_list(), dtype=float)  # dearest first
    likely = chances(above)[:, ::-1]
    acted = np.concatenate([s.acted for s in sequences])
    if estimator == "r_learner":
        psi, weights = r_learner(outcomes, acted, likely, cross_fitted(inputs, outcomes, fold))
    else:
        of_rungs = [cross_fitted(inputs, outcomes, fold, acted == rung) for rung in range(len(route))]
        psi, weights = doubly_robust(outcomes, acted, likely, np.stack(of_rungs, axis=1))
    psi = np.where(weights > 0, psi * differing(steps, drafts, route), 0.0)
    rows = torch.from_numpy(np.stack([psi, weights], axis=1)).float()
    return list(rows.split(sizes))


def r_learner(outcomes: Floats, acted: NDArray[np.int64], likely: Floats, expected: Floats) -> tuple[Floats, Floats]:
    """Pseudo-outcomes and weights [steps, rungs - 1] of all rungs but the cheapest, cheapest first.

    Args:
        outcomes: [steps].
        acted: [steps], in steps up from the cheapest rung.
        likely: [steps, rungs], with which each rung was drawn, cheapest first.
        expected: [steps], of the outcomes, whoever acts.
    """
    drawn = _drawn(acted, likely)
    psi = (outcomes - expected)[:, None] * (drawn[:, 1:] - drawn[:, :1])
    weights = likely[:, 1:] * likely[:, :1] / np.maximum(likely[:, 1:] + likely[:, :1], _NEVER)
    return psi, weights


def doubly_robust(
    outcomes: Floats, acted: NDArray[np.int64], likely: Floats, expected: Floats
) -> tuple[Floats, Floats]:
    """As `r_learner`, but for `expected`: [steps, rungs], of the outcomes where this rung acts, cheapest first."""
    corrected = expected + _drawn(acted, likely) * (outcomes[:, None] - expected)
    weights = ((likely[:, 1:] > 0) & (likely[:, :1] > 0)).astype(np.float64)
    return corrected[:, 1:] - corrected[:, :1], weights


def _drawn(acted: NDArray[np.int64], likely: Floats) -> Floats:
    """One over its chance for the rung that acted, 0 for the others: [steps, rungs]."""
    taken = acted[:, None] == np.arange(likely.shape[1])
    return np.where(taken, 1 / np.maximum(likely, _NEVER), 0.0)


def differing(steps: pl.DataFrame, drafts: pl.DataFrame, route: Sequence[str]) -> NDArray[np.bool_]:
    """At which steps each rung but the cheapest would act otherwise than that one, [steps, rungs - 1], cheapest first."""
    actions = drafts.pivot("precision", index=["episode_id", "turn"], values="action")
    joined = steps.select("episode_id", "turn").join(
        actions, on=["episode_id", "turn"], how="left", maintain_order="left", validate="1:1"
    )
    *dearer, cheapest = route
    return joined.select(pl.col(rung).ne(pl.col(cheapest)) for rung in reversed(dearer)).to_numpy()


def advantage_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Weighted mean square of what psi is off tau by.

    Args:
        logits: of the routing tokens, cheapest first, float [steps, rungs].
        target: [steps, 2, rungs - 1], rows of `targets`.
    """
    advantages = logits[:, 1:] - logits[:, :1]
    psi, weights = target.unbind(1)
    return (weights * (psi - advantages).square()).sum(1).mean()


def spread(margins: Floats) -> tuple[float, list[float]]:
    """Scale and offsets that give these margins [steps, rungs - 1] a mean of 0 and, all together, a deviation of 1: advantages
    are no log-odds, so that nothing can be calibrated but where the threshold lies among them."""
    deviation = float((margins - margins.mean(0)).std())
    scale = 1 / max(deviation, 1e-9)
    return scale, [-scale * float(mean) for mean in margins.mean(0)]


def folds(games: Sequence[str], sizes: Sequence[int], seed: int) -> NDArray[np.int64]:
    """A fold for each step, all of a game in one.

    Args:
        games: of each episode, its task.
        sizes: steps of each episode.
    """
    names = sorted(set(games))
    order = np.random.default_rng(seed).permutation(len(names))
    fold = {names[place]: rank % _FOLDS for rank, place in enumerate(order)}
    return np.repeat([fold[game] for game in games], sizes)


def cross_fitted(
    inputs: Floats, outcomes: Floats, fold: NDArray[np.int64], told: NDArray[np.bool_] | None = None
) -> Floats:
    """Ridge regression: what is expected of each row, from the rows of other folds; 0 where there are none.

    Args:
        told: the rows that it may be learned from; by default all.
    """
    expected = np.zeros(len(outcomes))
    for held in np.unique(fold):
        known = fold != held if told is None else (fold != held) & told
        if not known.any():
            continue
        mean, deviation = inputs[known].mean(0), inputs[known].std(0) + 1e-3
        x, centre = (inputs[known] - mean) / deviation, outcomes[known].mean()
        gram = x.T @ x / len(x) + _RIDGE * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x.T @ (outcomes[known] - centre) / len(x))
        wanted = fold == held
        expected[wanted] = (inputs[wanted] - mean) / deviation @ weights + centre
    return expected


def _inputs(sequence: RoutingSequence) -> Floats:
    """What m(x) looks at: a probe's features; of an LM, which reads the tokens, the turn."""
    if sequence.features is not None:
        return sequence.features.double().numpy()
    turns = np.arange(len(sequence.acted), dtype=float)
    return np.column_stack([turns, np.log1p(turns)])
