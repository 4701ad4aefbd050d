"""Episodes of agents whose environment is elsewhere: what is kept of each between its turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NoReturn

from dmr_pipeline.environments.base import Demonstration, Episode, Expert, Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.rollout.batch import OpenTranscript
from dmr_pipeline.rollout.policy import Decision, RoutingPolicy
from dmr_pipeline.rollout.trajectory import Step, Trajectory
from dmr_pipeline.router.budgets import Bar

DecidedBy = Literal["router", "rule", "fixed"]
"""A trained router; a rule that nobody trained (router/rules.py); nobody, since one precision acts throughout."""
Reason = Literal["router", "rule", "fixed", "forced", "budget", "fallback", "exploration"]
"""Why a precision acts: as in `DecidedBy`; or the recipe forces it; the session's budget allows no dearer one; who decides
failed; a random decision."""


@dataclass(frozen=True)
class Goal:
    """A task whose environment is elsewhere."""

    task_id: str
    task_type: str
    instruction: str

    def episode(self) -> Episode:
        self._refuse()

    def expert(self) -> Expert:
        self._refuse()

    def demonstration(self, rng: object) -> Demonstration:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(f"the environment of {self.task_id!r} is not here")


@dataclass(frozen=True)
class Decider:
    """Who decides which precision acts, step by step."""

    policy: RoutingPolicy
    by: DecidedBy = "router"
    release: int | None = None
    """Number of the release whose router it is."""
    threshold: float | None = None
    """Of a router, as `RouterSettings.threshold`, or of a rule."""
    router: PassBytes | None = None
    """What a pass of the router reads."""
    bar: Bar | None = None
    """What the levels of a router or a rule are compared with."""


@dataclass(frozen=True)
class Budget:
    """What an episode may spend. It holds for every episode, whenever it ends."""

    high_ratio: float | None = None
    """Mean spend (`ActingModels.spend`) of its steps at most, in [0, 1]; of two rungs, the high-precision ratio."""
    cost: float | None = None
    """In units of cost: a dearer rung than the cheapest acts only where its step surely fits into what is left of it. What the
    cheapest one spends is not refused."""


UNLIMITED = Budget()


@dataclass(frozen=True)
class Choice:
    """A decision as it was taken at work."""

    decision: Decision
    reason: Reason
    propensity: float
    """Probability with which the precision that acts was chosen, in (0, 1]: 1 where nothing was drawn."""
    release: int | None
    threshold: float | None


@dataclass(frozen=True)
class Action:
    """What the agent does next, and how it came about."""

    command: str
    thought: str
    """What it wrote before the command, where it is an agent that thinks."""
    precision: str
    """Rung that acted."""
    probability: float | None
    """The router's, that the dearest rung acts, or a rule's level; None where neither was asked."""
    threshold: float | None
    """That the probability was compared with."""
    reason: Reason
    release: int | None
    propensity: float
    """As `Choice.propensity`."""
    turn: int
    """Number of the step, from 1."""
    switched: bool
    """Another precision acted the step before."""
    prompt_tokens: int
    """Of the transcript before the action."""
    cached_tokens: int
    """Those of them that the acting precision had read before."""
    completion_tokens: int
    """Of the action, its end included."""
    cost: float
    """Of the step, in units of cost: the router's part and drafts that were thrown away included."""
    cost_at_dearest: float
    """What the same action takes where the dearest precision writes it, and always has."""
    finished: bool
    """The action ended by itself, and not for want of room."""
    cost_left: float | None = None
    """Of the session's cost budget before the step, None where there is none; below 0 where the cheapest precision alone has
    spent more."""


class Asked(NamedTuple):
    """How a step was asked for."""

    model: str
    temperature: float | None
    most: int | None
    """Tokens of the answer."""
    stops: tuple[str, ...]


@dataclass
class Session:
    """One episode that goes on."""

    session_id: str
    trajectory: Trajectory
    """What has been played; the last step's observation is empty as long as it is not known."""
    decider: Decider
    budget: Budget = UNLIMITED
    answers: list[str] = field(default_factory=list)
    """One for each step: what the client was told, or has told of steps that were taken elsewhere."""
    actions: list[Action] = field(default_factory=list)
    """One for each step that was taken here: all, unless there was a beginning elsewhere."""
    spend: float = 0.0
    """Sum over the steps of `ActingModels.spend`."""
    cost: float = 0.0
    """Sum over the steps, in units of cost."""
    margin: float = 1.0
    """Of the last action, as `OpenTranscript.margin`."""
    asked: Asked | None = None
    """How the last step was, so that the same request is known again."""
    admissible: Sequence[str] | None = None
    """Commands that do something where the transcript ends, where they were told."""
    held: OpenTranscript | None = None
    """The engine's, while it is in no slot."""

    @property
    def task(self) -> Task:
        return self.trajectory.run.task

    @property
    def turn(self) -> int:
        """Steps taken."""
        return len(self.trajectory.steps)

    @property
    def cost_left(self) -> float | None:
        """As `Action.cost_left`, of the next one."""
        return None if self.budget.cost is None else self.budget.cost - self.cost

    @property
    def has_foreign_steps(self) -> bool:
        """Whether its beginning was played elsewhere, so that it is not known which precisions acted."""
        return len(self.actions) < self.turn

    def admissible_commands(self) -> Sequence[str]:
        """
        Raises:
            UserError: they were not told, or there are none.
        """
        if not self.admissible:
            raise UserError(
                "this recipe's agent or router looks at the admissible commands, and this turn came without: send them with"
                " the observation (admissible_commands)"
            )
        return self.admissible

    def affords(self, rung: str, spend: float, worst_cost: Callable[[], float]) -> bool:
        """Whether the budget allows this rung now.

        Args:
            spend: `ActingModels.spend` of it.
            worst_cost: of its step at most, in units of cost.
        """
        ratio, cost = self.budget.high_ratio, self.budget.cost
        if ratio is not None and self.spend + spend > ratio * (self.turn + 1) + 1e-9:
            return False
        return cost is None or self.cost + worst_cost() <= cost


def spent(steps: Sequence[Step], spend: Mapping[str, float]) -> float:
    """Of steps that were taken elsewhere; a precision that is not known here counts as the dearest.

    Args:
        spend: as `ActingModels.spend`.
    """
    return sum(spend.get(step.precision, max(spend.values())) for step in steps)


def was_asked(choice: Choice, decider: Decider) -> bool:
    """Whether a router or a rule was asked for this decision."""
    return choice.reason in ("router", "rule", "exploration", "budget") and decider.by != "fixed"


def begun(session: Session, choice: Choice) -> Action:
    """The session's next action, as far as it is known before anything is written."""
    decision = choice.decision
    asked, before = was_asked(choice, session.decider), session.trajectory.steps
    return Action(
        command="",
        thought="",
        precision=decision.precision,
        probability=decision.exceedance[0] if asked and decision.exceedance else None,
        threshold=choice.threshold if asked else None,
        reason=choice.reason,
        release=choice.release,
        propensity=choice.propensity,
        turn=session.turn + 1,
        switched=bool(before) and before[-1].precision != decision.precision,
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=0,
        cost=0.0,
        cost_at_dearest=0.0,
        finished=True,
        cost_left=session.cost_left,
    )
