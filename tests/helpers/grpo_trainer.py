"""Episodes of our own making for the trainer of stage 2, and its section."""

from collections.abc import Sequence

from dmr_pipeline.recipe.grpo_router import GrpoRouter
from dmr_pipeline.router.model import Router, RoutingSequence, routing_sequence

EPISODES = [
    ([[10, 11, 12], [13, 14]], [[20, 5], [21, 5]]),
    ([[10, 11, 12], [15], [16, 17, 18, 19]], [[20, 22, 23, 5], [5], [24, 5]]),
    ([[30, 31]], [[20, 5]]),
    ([[30, 31], [32] * 9], [[25, 5], [26, 27, 5]]),
]
"""Segments and actions of two groups of two episodes, of different lengths."""
CHOICES = [["float", "int2"], ["int2", "int2", "float"], ["float"], ["int2", "float"]]
"""Precisions that acted there."""


def section(**changes: float | str) -> GrpoRouter:
    settings = {"updates": 1, "games_per_update": 2, "group_size": 2, "learning_rate": 1e-3, "cost_weight": 0.1}
    return GrpoRouter.model_validate(settings | {"validate_every": 1, "validation_games": 1} | changes)


def sequences(router: Router, choices: Sequence[Sequence[str]]) -> list[RoutingSequence]:
    return [
        routing_sequence(*episode, acted, router.settings) for episode, acted in zip(EPISODES, choices, strict=True)
    ]
