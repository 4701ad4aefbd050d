"""The policy at work: each session by its own decider, held to its budget, sometimes at random, and never without an answer."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from dmr_pipeline.rollout.choosing import seeded_generator
from dmr_pipeline.rollout.policy import Decision, DecisionContext, certain
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.budgets import Bar
from dmr_pipeline.router.off_policy import chances_at
from dmr_pipeline.serve.sessions import Choice, Decider, Reason, Session

log = logging.getLogger(__name__)


@dataclass
class Deciding:
    """A `RoutingPolicy` over sessions."""

    route: Sequence[str]
    """The routed rungs, dearest first."""
    spend: Mapping[str, float]
    """As `ActingModels.spend`."""
    worst_cost: Callable[[Session, str, str | None], float]
    """Of a session's next step at most, in units of cost, if this rung acts and, where one is named, checks what that drafts."""
    fallback: str
    """Rung that acts where a router fails."""
    epsilon: float = 0.0
    """Share of decisions that are drawn among the routed rungs, each as likely as another."""
    seed: int = 0
    """Of these draws; also (session, turn) tell them apart."""
    sessions: dict[int, Session] = field(default_factory=dict)
    """By slot."""
    choices: dict[int, Choice] = field(default_factory=dict)
    """The last one of each slot."""
    failures: int = 0
    """Decisions that a router did not give."""
    _told: dict[int, Decider] = field(default_factory=dict)
    """Slot -> the decider that knows its transcript."""
    _unfinished: set[int] = field(default_factory=set)
    """Slots of which a step was decided and, so far, not taken."""

    def begin(self, slot: int, run: RolloutRequest) -> None:
        """The session that `sessions` names begins, or goes on in this slot: its decider is told of it before it decides."""
        self._told.pop(slot, None)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        by_decider: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            if self._is_told(slot):
                by_decider.setdefault(id(self.sessions[slot].decider), []).append(i)
        answers: dict[int, Decision | None] = {}
        for places in by_decider.values():
            decider = self.sessions[slots[places[0]]].decider
            answers |= zip(
                places,
                self._asked(decider, [slots[i] for i in places], [segments[i] for i in places], peek),
                strict=True,
            )
        for i, slot in enumerate(slots):
            self.choices[slot] = self._choice(self.sessions[slot], answers.get(i))
        self._unfinished.update(slots)
        return [self.choices[slot].decision for slot in slots]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self._unfinished.discard(slot)
        if slot in self._told:
            self._told[slot].policy.acted(slot, segment, precision, action)

    def forget(self, slot: int) -> None:
        """The session has left this slot."""
        self.sessions.pop(slot, None)
        self._told.pop(slot, None)
        self._unfinished.discard(slot)

    def within_budget(self, session: Session, choice: Choice, chances: Mapping[str, float]) -> Choice:
        """The choice, or the dearest rung below it that the session's budget allows.

        Args:
            chances: rung -> with which it was drawn; none where what was chosen was certain.
        """
        drafter = choice.decision.drafter
        affordable = {rung: self._affordable(session, rung, drafter) for rung in {choice.decision.precision, *chances}}
        acting = affordable[choice.decision.precision]
        if chances:
            choice = replace(choice, propensity=sum(p for rung, p in chances.items() if affordable[rung] == acting))
        if acting == choice.decision.precision:
            return choice
        if choice.reason in ("fallback", "forced"):  # nobody was asked
            return replace(
                choice, decision=Decision(acting, certain(acting, self.route), forced=choice.decision.forced)
            )
        return replace(choice, decision=replace(choice.decision, precision=acting, drafter=None), reason="budget")

    def _is_told(self, slot: int) -> bool:
        """Whether the session's decider knows its transcript: it is told where it does not yet."""
        session = self.sessions[slot]
        # Where what was decided was not carried out, the router has read a segment that comes again.
        if self._told.get(slot) is session.decider and slot not in self._unfinished:
            return True
        try:
            session.decider.policy.begin(slot, session.trajectory.run)
            for step in session.trajectory.steps:
                session.decider.policy.acted(slot, step.segment, step.precision, step.action)
        except Exception as error:  # noqa: BLE001 - as in `_asked`
            self._failed([slot], session.decider, error)
            return False
        self._told[slot] = session.decider
        return True

    def _asked(
        self, decider: Decider, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext
    ) -> Sequence[Decision | None]:
        """None where the router failed."""
        try:
            return decider.policy.decide(slots, segments, peek)
        except Exception as error:  # noqa: BLE001 - whatever happens to a router, the agent acts
            if len(slots) == 1:
                self._failed(slots, decider, error)
                return [None]
        alone: list[Decision | None] = []  # one of them may be at fault
        for slot, segment in zip(slots, segments, strict=True):
            self._told.pop(slot, None)
            alone += self._asked(decider, [slot], [segment], peek) if self._is_told(slot) else [None]
        return alone

    def _failed(self, slots: Sequence[int], decider: Decider, error: Exception) -> None:
        log.warning("release %s: the router failed (%s), %s acts", decider.release, type(error).__name__, self.fallback)
        self.failures += len(slots)
        for slot in slots:  # what it has read by then is not known: it is told anew before it is asked again
            self._told.pop(slot, None)

    def _choice(self, session: Session, answer: Decision | None) -> Choice:
        decider = session.decider
        if answer is None:
            decision = Decision(self.fallback, certain(self.fallback, self.route))
            return self.within_budget(
                session, Choice(decision, "fallback", 1.0, decider.release, decider.threshold), {}
            )
        reason: Reason = "forced" if answer.forced else decider.by
        chances = {answer.precision: 1.0}
        if decider.bar is not None and not answer.forced:
            chances = drawn_by(decider.bar, session, answer, self.route)
        if reason in ("router", "rule") and self.epsilon > 0:
            uniform = self.epsilon / len(self.route)
            chances = {rung: uniform + (1 - self.epsilon) * chances.get(rung, 0.0) for rung in self.route}
            draw = seeded_generator("exploration", self.seed, session.session_id, session.turn)
            if draw.random() < self.epsilon:
                drawn = self.route[int(draw.integers(len(self.route)))]
                answer, reason = replace(answer, precision=drawn, drafter=None), "exploration"
        propensity = chances[answer.precision]
        return self.within_budget(
            session, Choice(answer, reason, propensity, decider.release, decider.threshold), chances
        )

    def _affordable(self, session: Session, rung: str, drafter: str | None) -> str:
        """The rung, or the dearest below it that the budget allows; these write themselves."""
        for cheaper in self.route[self.route.index(rung) : -1]:
            drafts = drafter if cheaper == rung and drafter != rung else None
            if session.affords(cheaper, self.spend[cheaper], partial(self.worst_cost, session, cheaper, drafts)):
                return cheaper
        return self.route[-1]


def drawn_by(bar: Bar, session: Session, decision: Decision, route: Sequence[str]) -> dict[str, float]:
    """Rung -> the chance that this bar takes it at this step."""
    dearer = sum(step.precision != route[-1] for step in session.trajectory.steps)
    chances = chances_at(bar, decision.exceedance, route, session.turn, dearer)
    return chances if decision.precision in chances else {decision.precision: 1.0}
