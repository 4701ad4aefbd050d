"""What a dearer rung is worth at a step, learned from mixed episodes: the other target of stage 1.

The advantage tau_k(x) is the chance of success where rung k takes the step, minus that where the cheapest one does, and the
episode goes on at random precisions as the mixed behaviour does. While trajectories are collected every step's rung a is drawn
with known chances e_k, whatever the state x, so that the pseudo-outcome

    psi_k = (success - m(x)) (1[a = k] / e_k - 1[a = cheapest] / e_cheapest)

is tau_k(x) in the mean, and the least mean of w_k (psi_k - tau_k)^2 finds it, with w_k = e_k e_c / (e_k + e_c) (c: cheapest),
by which noisy ones count less. Of two rungs this is the R-learner (Nie and Wager, 2021; Robinson, 1988), the square of its
treatment's surprise at its mean. As the chances are known, any m(x) that does not look at the episode's own game leaves the
mean where it is, and a good one makes the noise small: here a ridge regression on what the router decides on, of other games.
Where rung k and the cheapest would take the same action nothing follows from who does: psi_k is 0 there, which takes most of
the noise away. (With one cache for all rungs that is our simplification.)

A router's margin of rung k is tau_k, and its threshold a price in success. All of this is ours: the paper's labels are
divergences.
"""

from collections.abc import Sequence

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

_FOLDS = 5
_RIDGE = 0.01
"""Of a mean squared error, features standardised."""


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
    expected = cross_fitted(np.concatenate([_inputs(s) for s in sequences]), outcomes, fold)
    above = np.array(steps["exceedance"].to_list(), dtype=float)  # dearest first
    likely = chances(above)[:, ::-1]
    acted = np.concatenate([s.acted for s in sequences])[:, None] == np.arange(len(route))
    weights = likely[:, 1:] * likely[:, :1] / np.maximum(likely[:, 1:] + likely[:, :1], 1e-9)
    drawn = np.where(acted, 1 / np.maximum(likely, 1e-9), 0.0)
    psi = (outcomes - expected)[:, None] * (drawn[:, 1:] - drawn[:, :1]) * differing(steps, drafts, route)
    rows = torch.from_numpy(np.stack([np.where(weights > 0, psi, 0.0), weights], axis=1)).float()
    return list(rows.split(sizes))


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


def cross_fitted(inputs: Floats, outcomes: Floats, fold: NDArray[np.int64]) -> Floats:
    """Ridge regression: what is expected of each row, from the rows of other folds; 0 where there are none."""
    expected = np.zeros(len(outcomes))
    for held in np.unique(fold):
        known = fold != held
        if not known.any():
            continue
        mean, deviation = inputs[known].mean(0), inputs[known].std(0) + 1e-3
        x, centre = (inputs[known] - mean) / deviation, outcomes[known].mean()
        gram = x.T @ x / len(x) + _RIDGE * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x.T @ (outcomes[known] - centre) / len(x))
        expected[~known] = (inputs[~known] - mean) / deviation @ weights + centre
    return expected


def _inputs(sequence: RoutingSequence) -> Floats:
    """What m(x) looks at: a probe's features; of an LM, which reads the tokens, the turn."""
    if sequence.features is not None:
        return sequence.features.double().numpy()
    turns = np.arange(len(sequence.acted), dtype=float)
    return np.column_stack([turns, np.log1p(turns)])
