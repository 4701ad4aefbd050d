"""Nearest neighbours instead of a trained head: a probe that remembers the labelled steps, and lets those that look most alike
vote. Benchmarks of routers find that they often match trained ones, and they cost no training.

Steps are compared by what a probe decides on, standardised, and vote by one over their distance. Of classes (target divergence)
logits are the logarithms of the shares of votes, as if one neighbour more had voted for all alike; of effects (targets advantage
and consequence) they are weighted means. All that is remembered is read at each decision, and charged for. But for the idea it is
ours.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from dmr_pipeline.recipe.kl_router import Target
from dmr_pipeline.router.model import Router, RoutingSequence
from dmr_pipeline.router.probe import NeighboursHead, ProbeConfig


def remember(
    router: Router,
    sequences: Sequence[RoutingSequence],
    targets: Sequence[Tensor],
    target: Target,
    held: Collection[int] = (),
) -> Router:
    """The router with these steps.

    Args:
        router: of a `NeighboursHead` whose features are standardised.
        sequences: with what a probe decides on.
        targets: of each sequence, a row a step: its class (divergence), or rows as of `advantage.targets`, of which those without
            any weight are left out.
        held: sequences, by their place, that are not remembered.
    """
    old, places = cast(NeighboursHead, router.model), [i for i in range(len(sequences)) if i not in held]
    features = torch.cat([cast(Tensor, sequences[i].features) for i in places]).to(old.device)
    rows, rungs = torch.cat([targets[i] for i in places]).to(old.device), len(router.settings.route)
    if target == "divergence":
        values = torch.nn.functional.one_hot(rows, rungs).float()
        weights = torch.ones_like(values)
    else:
        nothing = torch.zeros_like(rows[:, 0, :1])  # of the cheapest rung, with which the others are compared
        values, weights = (
            torch.cat([column, rows[:, place]], dim=1) for place, column in ((0, nothing), (1, nothing + 1))
        )
        known = weights[:, 1:].any(dim=1)
        features, values, weights = features[known], values[known], weights[known]
    content = old.config.to_dict() | {"stored": len(values), "classes": target == "divergence"}
    model = NeighboursHead(ProbeConfig(**content)).to(old.device)
    with torch.no_grad():
        for name, value in (("mean", old.mean), ("deviation", old.deviation), ("values", values), ("weights", weights)):
            getattr(model, name).copy_(value)
        model.points.copy_(model.standard(features))
    return replace(router, model=model.eval())
