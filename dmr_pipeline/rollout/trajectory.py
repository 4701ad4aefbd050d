"""Episodes that were played, step by step."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dmr_pipeline.environments.base import Task
from dmr_pipeline.rollout.failures import PARSE_FAILURES, Failure
from dmr_pipeline.rollout.reading import NOTHING, Reading

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutRequest:
    """One episode to play."""

    task: Task
    member: int = 0
    """Number within a group of episodes of one task, or of a random draw."""


@dataclass(frozen=True)
class Step:
    """One step of an episode."""

    segment: list[int]
    """Tokens appended before the action: the observation and what the prompt puts around it."""
    action: list[int]
    """Generated tokens, the end included."""
    command: str
    observation: str
    """What the command showed."""
    precision: str
    """Name of the rung that acted."""
    exceedance: tuple[float, ...]
    """As `Decision.exceedance`."""
    reading: Reading = NOTHING
    """What the acting precision's forward passes read: catch-up, segment, and all but the last generated token; where it
    checked, drafts besides."""
    besides: Mapping[str, Reading] = field(default_factory=dict)
    """Another rung -> what its forward passes read: those that the decision needed and that were thrown away, and those that
    drafted what the acting one checked."""
    router: Reading = NOTHING
    """As `Decision.router`."""
    features: NDArray[np.float32] | None = field(default=None, compare=False)
    """What the router decided on, where it is to learn from it."""
    forced: bool = False
    """A rule decided, and the router was not asked."""
    drafted: int = 0
    """Tokens that another rung drafted for the acting one to check."""
    accepted: int = 0
    """Those of them that it took."""
    failure: Failure | None = None
    """How the action failed to be a command that does something."""

    @property
    def readings(self) -> list[tuple[str, Reading]]:
        """What the forward passes of each rung read, the acting one's first."""
        return [(self.precision, self.reading), *self.besides.items()]


@dataclass
class Trajectory:
    """One played episode."""

    run: RolloutRequest
    opening: str
    """First observation."""
    steps: list[Step] = field(default_factory=list)
    reward: float = 0.0
    """Of the last step, in [0, 1]: what the benchmark calls the episode's score."""
    outgrown: bool = False
    """Ended, as lost, since its next step would not have fitted into the agents' streams."""

    @property
    def success(self) -> bool:
        return self.reward >= 1.0

    @property
    def tokens_read(self) -> int:
        """By all forward passes of all rungs."""
        return sum(reading.tokens for step in self.steps for _, reading in step.readings)

    def share(self, precision: str) -> float:
        """Of the steps, those at which it acted."""
        return sum(step.precision == precision for step in self.steps) / len(self.steps)


def warn_of_outgrown(played: Sequence[Trajectory], capacity: int) -> None:
    """Log how many episodes were cut off, if any."""
    outgrown = sum(trajectory.outgrown for trajectory in played)
    if outgrown:
        log.warning(
            "%d of %d episodes outgrew the %d tokens of a transcript (agent.max_transcript_tokens) and count as lost",
            outgrown,
            len(played),
            capacity,
        )


_MANY_FAILURES = 0.1
"""Of the steps."""


def warn_of_parse_failures(played: Sequence[Trajectory], who: str) -> None:
    """Log how actions were no actions as the prompt wants them, if many were not.

    Args:
        who: has acted.
    """
    failures = Counter(step.failure for trajectory in played for step in trajectory.steps)
    if sum(failures[failure] for failure in PARSE_FAILURES) >= _MANY_FAILURES * max(failures.total(), 1):
        shares = (f"{failures[f] / failures.total():.0%} {f}" for f in PARSE_FAILURES if failures[f])
        log.warning(
            "%s: many actions are not as agent.prompt wants them, %s of the steps (rollout/failures.py)",
            who,
            ", ".join(shares),
        )
