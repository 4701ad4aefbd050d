"""What an episode costs: bytes of weights read; and what an outcome is worth at that cost.

Our definition, since the paper gives none: the sum, over an episode's forward passes at batch 1, of the weight bytes that the
pass reads. Generating an action of n tokens takes n passes of the acting precision: one reads the new segment, together with
whatever this precision has not seen yet (catch-up after a switch), and n - 1 read one token each; the router's decision takes
one pass of the router, unless the step is forced. A policy that lets a precision draft, or read, before it decides pays for
the passes that are thrown away where another one then acts. Reports divide by the mean cost of an always-high episode on
validation games.
"""

from collections.abc import Mapping

from dmr_pipeline.recipe import GrpoRouter
from dmr_pipeline.rollout.engine import Trajectory


def episode_cost(trajectory: Trajectory, weight_bytes: Mapping[str, int], router_bytes: int = 0) -> float:
    """Bytes read.

    Args:
        weight_bytes: rung -> bytes that one pass of the agent reads.
        router_bytes: bytes that one decision of the router reads; 0 for policies that need none.
    """
    return float(
        sum(
            weight_bytes[step.precision] * len(step.action)
            + sum(weight_bytes[rung] * passes for rung, passes in step.wasted.items())
            + router_bytes * (not step.forced)
            for step in trajectory.steps
        )
    )


def reward(success: bool, cost: float, section: GrpoRouter) -> float:
    """Of one episode, what stage 2 maximises and routers are compared by: success - lambda * cost (`difference`, the paper's)
    or success * (1 - lambda * cost) (`gated`, ours).

    Args:
        cost: in mean always-high episodes.
    """
    if section.reward == "gated":
        return success * (1 - section.cost_weight * cost)
    return success - section.cost_weight * cost
