"""Who decides which precision acts, and what it may ask for; policies that need no router."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.known import Drafting
from dmr_pipeline.rollout.reading import NOTHING, Reading
from dmr_pipeline.rollout.trajectory import RolloutRequest


@dataclass(frozen=True)
class Draft:
    """What one precision would do at a step."""

    action: list[int]
    """Tokens, the end included."""
    reading: Reading
    """What its forward passes read."""
    margin: float
    """How far the likeliest token led the next, in probability: the least lead of the action (where commands are scored,
    the likeliest command's)."""
    drafting: Drafting | None = None
    """Where another precision drafted it, what that took, all its forward passes included."""
    mean_margin: float = 1.0
    """The mean lead of the action's tokens; where commands are scored, `margin`."""
    entropy: float = 0.0
    """The greatest, in nats, of the distributions that the action's tokens were chosen from (where commands are scored, that of
    the commands); of what was checked it is not known, and 0."""


class DecisionContext(Protocol):
    """What a policy may ask for about the slots being decided."""

    def drafts(self, precision: str, slots: Sequence[int]) -> list[Draft]:
        """What this precision would do at each of these slots, which are among those being decided. It costs the forward passes
        of acting, once a step."""
        ...

    def states(self, slots: Sequence[int], layers: Sequence[int]) -> Tensor:
        """The cheapest precision's hidden states once it has read the transcript: float32 [slots, len(layers) * hidden size], on
        the CPU.

        One forward pass, which is lost only where another precision then acts: otherwise generation goes on from it.

        Args:
            slots: some of those being decided; asked for once a step.
            layers: decoder layers, from 1.
        """
        ...

    def admissible_commands(self, slots: Sequence[int]) -> list[Sequence[str]]:
        """What can be done at each slot's page or place."""
        ...

    def margins(self, slots: Sequence[int]) -> list[float]:
        """`Draft.margin` of each slot's last action, by the precision that took it; 1 where there is none."""
        ...

    def command(self, action: list[int]) -> str:
        """The command in an action's tokens."""
        ...

    @property
    def can_check(self) -> bool:
        """Whether a precision can check what a cheaper one drafts: actions are written, and all caches can be cut."""
        ...


@dataclass(frozen=True)
class Decision:
    precision: str
    """Name of the rung that acts."""
    exceedance: tuple[float, ...]
    """For every routed rung but the cheapest, dearest first: how likely it, or a dearer one, is to act, in [0, 1]. It is what
    thresholds are compared with; of two rungs, the probability of the dearer one."""
    router: Reading = NOTHING
    """What the router's own forward pass read."""
    charged: bool = True
    """Whether what it asked of the precisions, and that did not act, is paid for; an oracle knows for nothing."""
    features: NDArray[np.float32] | None = None
    """What the router decided on, where it is to learn from it."""
    forced: bool = False
    """A rule decided, and the router was not asked."""
    drafter: str | None = None
    """Name of a cheaper rung: it drafts the action, and the one that acts checks it. None: that one writes it. Where the rung's
    greedy draft was asked for, that is what is checked first."""


class RoutingPolicy(Protocol):
    """Decides before each step which precision acts. Holds state per slot."""

    def begin(self, slot: int, run: RolloutRequest) -> None: ...

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        """`segments` are the tokens that each transcript has grown by since the last action."""
        ...

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        """What was appended to the transcript in this step, whoever decided, and which precision acted."""
        ...


@dataclass(frozen=True)
class SinglePrecision:
    """One precision acts throughout (a static-precision baseline)."""

    precision: str
    route: Sequence[str] = ()
    """The routed rungs, dearest first, where it is one of them."""
    drafter: str | None = None
    """As `Decision.drafter`."""

    def begin(self, slot: int, run: RolloutRequest) -> None:
        pass

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        return [Decision(self.precision, certain(self.precision, self.route), drafter=self.drafter)] * len(slots)

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        pass


def static_policy(text: str, rungs: Sequence[str]) -> SinglePrecision:
    """What needs no router, by its name: a rung that acts throughout, or `int4<int2`, of which the first checks what the second
    drafts.

    Args:
        rungs: that are at hand, dearest first.

    Raises:
        UserError: one of them is not.
    """
    for rung in rungs_of(text):
        if rung not in rungs:
            raise UserError(f"{rung!r} is none of the rungs that are loaded ({', '.join(rungs)})")
    rung, _, drafter = text.partition("<")
    return SinglePrecision(rung, rungs, drafter or None)


def rungs_of(text: str) -> list[str]:
    """That the static policy of this name acts with."""
    rung, checks, drafter = text.partition("<")
    return [rung, drafter] if checks else [rung]


@dataclass(frozen=True)
class Forced:
    """A rule before a policy: where it holds, one precision acts and the policy is not asked.

    Args:
        when: for each slot being decided, whether the rule holds.
    """

    policy: RoutingPolicy
    precision: str
    route: Sequence[str]
    when: Callable[[Sequence[int], DecisionContext], Sequence[bool]]

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self.policy.begin(slot, run)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        held = self.when(slots, peek)
        asked = [i for i, holds in enumerate(held) if not holds]
        answers = self.policy.decide([slots[i] for i in asked], [segments[i] for i in asked], peek) if asked else []
        decisions = [Decision(self.precision, certain(self.precision, self.route), forced=True)] * len(slots)
        for i, answer in zip(asked, answers, strict=True):
            decisions[i] = answer
        return decisions

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self.policy.acted(slot, segment, precision, action)


def certain(precision: str, route: Sequence[str]) -> tuple[float, ...]:
    """`Decision.exceedance` where it is certain which of the routed rungs acts; empty where it is none of them."""
    if precision not in route:
        return ()
    place = route.index(precision)
    return tuple(float(place <= k) for k in range(len(route) - 1))
