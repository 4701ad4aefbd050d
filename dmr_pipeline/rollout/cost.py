"""What an episode costs: bytes read; and what an outcome is worth at that cost.

Our definition, since the paper gives none: the sum, over an episode's forward passes at batch 1, of the bytes that the pass
reads, weights and keys and values (precision/pass_bytes.py). Generating an action of n tokens takes n passes of the acting
precision: one reads the new segment, together with whatever this precision has not seen yet (catch-up after a switch), and n - 1
read one token each; where it is looked up in the transcript (recipe: `precisions.prompt_lookup`), as many as it then takes.
Choosing among commands takes one pass for the segment and one a command. The router's decision takes one pass of the router,
unless the step is forced. A policy that lets a precision draft, or read, before it decides pays for what is thrown away where
another one then acts. Catch-up makes a pass read more tokens, not more weights: what a switch costs is compute, which reports
show beside the bytes as the tokens that were read.

The unit is the mean episode of the ladder's dearest rung on validation games, with 16-bit weights, at a pass a token.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.recipe.grpo_router import GrpoRouter
from dmr_pipeline.rollout.reading import Reading, one_by_one
from dmr_pipeline.rollout.trajectory import Trajectory


class Cost(NamedTuple):
    """In bytes, or in units of cost."""

    weights: float
    cache: float

    @property
    def total(self) -> float:
        return self.weights + self.cache


def bytes_read(reading: Reading, model: PassBytes, cache_bits: int) -> Cost:
    """Of one model's forward passes.

    Args:
        cache_bits: of a number in the KV cache.
    """
    weights = reading.passes * model.weights + reading.tokens * model.embedding_row
    return Cost(float(weights), reading.cached * model.cached_numbers * cache_bits / 8)


def episode_cost(
    trajectory: Trajectory, rungs: Mapping[str, PassBytes], cache_bits: int, router: PassBytes | None = None
) -> Cost:
    """Bytes read.

    Args:
        rungs: what a pass of each reads.
        cache_bits: of a number in the KV cache.
        router: what a pass of the router reads; None for policies that have none.
    """
    read = [
        bytes_read(reading, rungs[rung], cache_bits) for step in trajectory.steps for rung, reading in step.readings
    ]
    if router is not None:
        read += [bytes_read(step.router, router, cache_bits) for step in trajectory.steps]
    return Cost(sum(cost.weights for cost in read), sum(cost.cache for cost in read))


def a_pass_a_token(trajectory: Trajectory) -> Trajectory:
    """As if each token of its actions had taken a pass of who acted, who has written all there is: nothing was looked up."""
    held, steps = 0, []
    for step in trajectory.steps:
        unread = len(step.segment) + (held > 0)  # the last action's last token
        held += len(step.segment)
        steps.append(replace(step, reading=Reading(tokens=unread) + one_by_one(held, len(step.action))))
        held += len(step.action)
    return replace(trajectory, steps=steps)


def reward(success: bool, cost: float, section: GrpoRouter, price: float | None = None) -> float:
    """Of one episode, what stage 2 maximises and routers are compared by: success - lambda * cost (`difference`, the paper's)
    or success * (1 - lambda * cost) (`gated`, ours).

    Args:
        cost: in units of cost.
        price: lambda; by default the recipe's.
    """
    price = section.cost_weight if price is None else price
    if section.reward == "gated":
        return success * (1 - price * cost)
    return success - price * cost
