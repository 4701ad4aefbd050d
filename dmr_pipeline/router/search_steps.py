"""Search steps, the paper's special case for WebShop: "high-KL `search` steps are forced to high precision".

No more is known of it than these words. Here a search step is one at whose page there is a search bar. Where they are forced
(`with_searches_forced`), the dearest precision acts at them by rule: the policy is not asked, which saves a router's forward
pass, and learns nothing from them in stage 2. Whether their divergence is high is decided once, in stage 1 (see kl.py).
"""

from collections.abc import Sequence

from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.webshop.benchmark import SEARCH
from dmr_pipeline.rollout.policy import DecisionContext, Forced, RoutingPolicy


def at_search_bar(slots: Sequence[int], peek: DecisionContext) -> list[bool]:
    """For each of these slots: is there a search bar?"""
    return [any(command.startswith(SEARCH) for command in commands) for commands in peek.admissible_commands(slots)]


def with_searches_forced(policy: RoutingPolicy, route: Sequence[str]) -> Forced:
    """The dearest precision acts at search steps, the policy decides the others."""
    return Forced(policy, route[0], route, at_search_bar)


def opens_at_search_bar(task: Task) -> bool:
    """Whether there is one on the task's first page."""
    episode = task.episode()
    episode.reset()
    return any(command.startswith(SEARCH) for command in episode.admissible_commands())
