"""The rungs of a ladder in this process, acting on many sessions together.

Keys and values stay where they are between the turns of a session, so that a turn reads only what is new. There are fewer places
for them than sessions: one that comes back after others took its place is read again, and goes on as it would have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.precisions import Speculative
from dmr_pipeline.rollout.batch import Batch, OpenTranscript, Taken, Timings, unheard
from dmr_pipeline.rollout.cost import bytes_read
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import static_policy
from dmr_pipeline.rollout.prompts import Moment, Prompter
from dmr_pipeline.rollout.reading import NOTHING, Reading, Round, checking, drafting, one_by_one
from dmr_pipeline.rollout.trajectory import RolloutRequest, Step, Trajectory
from dmr_pipeline.router.rules import is_rule_at_bar, rule_at_bar, rules
from dmr_pipeline.serve.deciding import Deciding
from dmr_pipeline.serve.sessions import UNLIMITED, Action, Budget, Choice, Decider, Session, spent, was_asked


@dataclass(frozen=True)
class Turn:
    """A step that was taken elsewhere."""

    observation: str
    """What the agent saw before it."""
    command: str
    thought: str = ""
    precision: str | None = None
    """Rung that acted; None: not known, and taken for the dearest."""


@dataclass(frozen=True)
class Ask:
    """A session's turn: what its environment shows, and what is wanted of the action."""

    session: Session
    observation: str
    admissible: Sequence[str] | None = None
    temperature: float | None = None
    """None: as the recipe says."""
    max_tokens: int | None = None
    """Of the action, at most as many as the recipe's prompt allows."""
    hear: Callable[[Session, Choice, Sequence[int]], bool] | None = None
    """Told of what is written of the action, after each token that does not complete it; not where a draft is checked, or
    commands are scored. Returns whether nobody waits for it: then the step is not taken."""


class LocalAgents:
    """
    Args:
        slots: sessions whose keys and values are kept, of which so many act at once.
        seed: of actions at a temperature, and of exploration.
        epsilon: as `Deciding.epsilon`.
        fallback: rung that acts where a router fails; the dearest by default.
    """

    def __init__(
        self, rollouts: Rollouts, slots: int, seed: int = 0, epsilon: float = 0.0, fallback: str | None = None
    ) -> None:
        self.rollouts, self.slots = rollouts, slots
        self.deciding = Deciding(
            rollouts.route,
            rollouts.acting.spend,
            self._worst_cost,
            fallback or rollouts.route[0],
            epsilon,
            seed,
        )
        self.batch = Batch(
            rollouts.streams(slots + 1),
            rollouts.prompter,
            self.deciding,
            rollouts.action,
            rollouts.temperature,
            seed,
            Timings(),
            None,
            rollouts.speculative or Speculative(),
            rollouts.prompt_lookup,
        )
        self._aside = slots
        """The slot of what is decided and not played."""
        self._last_used: dict[int, int] = {}
        self._clock = count()

    def untrained(self, name: str) -> Decider:
        """
        Args:
            name: of a static policy (`static_policy`), or of a rule at a threshold (`rule_at_bar`).

        Raises:
            UserError: a rung of it is not loaded, or cannot check drafts; or there is no such rule.
        """
        rollouts = self.rollouts
        if is_rule_at_bar(name):
            return rule_decider(name, rollouts)
        policy = static_policy(name, rollouts.route)
        if policy.drafter is not None and not rollouts.can_draft:
            raise UserError(
                f"{name}: drafts cannot be checked here, since commands are scored or a cache cannot be cut"
            )
        return Decider(policy, "fixed")

    def open(
        self,
        session_id: str,
        run: RolloutRequest,
        decider: Decider,
        budget: Budget = UNLIMITED,
        past: Sequence[Turn] = (),
    ) -> Session:
        """A session that is yet to be shown its next observation.

        Args:
            past: steps that were taken elsewhere.

        Raises:
            UserError: they cannot be written down, since the prompt tells what was admissible at each, and that is not known.
        """
        if past:
            refuse_untold(self.rollouts.prompter)
        session = Session(session_id, Trajectory(run, past[0].observation if past else ""), decider, budget)
        prompter, dearest = self.rollouts.prompter, self.rollouts.route[0]
        for turn, done in enumerate(past):
            segment = self._segment(session, done.observation)
            action = prompter.action(done.command, done.thought)
            shown = past[turn + 1].observation if turn + 1 < len(past) else ""
            step = Step(segment, action, done.command, shown, done.precision or dearest, ())
            session.trajectory.steps.append(step)
            session.answers.append(done.command)
        session.spend = spent(session.trajectory.steps, self.rollouts.acting.spend)
        return session

    def act(self, asks: Sequence[Ask]) -> list[Action | Exception]:
        """The next action of each of these sessions, which are all different; or why there is none."""
        found: dict[int, Action | Exception] = {}
        kinds: dict[tuple[float, int], list[int]] = {}
        for i, ask in enumerate(asks):
            try:
                kinds.setdefault(self._kind(ask), []).append(i)
            except UserError as error:
                found[i] = error
        for (temperature, most), places in kinds.items():
            for start in range(0, len(places), self.slots):
                part = places[start : start + self.slots]
                found |= zip(part, self._act_together([asks[i] for i in part], temperature, most), strict=True)
        return [found[i] for i in range(len(asks))]

    def decide(self, ask: Ask) -> Choice:
        """What would be decided at this turn. Nothing is run but what the router itself needs, and the session stays as it is.

        Raises:
            UserError: there is no room for another step.
        """
        aside = replace(ask.session, held=None, admissible=ask.admissible)
        self._set(*self._kind(ask))
        try:
            self._place(aside, self._aside, self._segment(aside, ask.observation))
            self.batch.decide([self._aside])
        finally:
            self._leave(self._aside)
        return self.deciding.choices[self._aside]

    def close(self, session: Session) -> None:
        """The session has ended: its place is free."""
        slot = self._slot_of(session)
        if slot is not None:
            self._leave(slot)
        session.held = None

    @property
    def clock(self) -> Timings:
        """Seconds since it was last asked for."""
        spent, self.batch.clock = self.batch.clock, Timings()
        return spent

    def _kind(self, ask: Ask) -> tuple[float, int]:
        most = self.rollouts.prompter.prompt.max_action_tokens
        if ask.session.turn >= self.rollouts.step_limit:
            raise UserError(
                f"the episode has had its {self.rollouts.step_limit} steps (benchmark.step_limit): post its outcome, and begin"
                " another one"
            )
        temperature = self.rollouts.temperature if ask.temperature is None else ask.temperature
        return temperature, min(most, ask.max_tokens or most)

    def _set(self, temperature: float, most: int) -> None:
        """How the next actions are written: at this temperature, and of so many tokens at most."""
        self.batch.temperature, self.batch.prompter = temperature, _limited(self.rollouts.prompter, most)

    def _act_together(self, asks: Sequence[Ask], temperature: float, most: int) -> list[Action | Exception]:
        self._set(temperature, most)
        placed: dict[int, Ask] = {}
        found: dict[int, Action | Exception] = {}
        busy = {slot for slot in map(self._slot_of, (ask.session for ask in asks)) if slot is not None}
        for i, ask in enumerate(asks):
            session = ask.session
            session.admissible = ask.admissible
            slot = self._slot_of(session)
            if slot is None:
                slot = self._free_slot(busy)
                busy.add(slot)
            try:
                self._place(session, slot, self._segment(session, ask.observation))
            except UserError as error:
                found[i] = error
                continue
            except Exception as error:  # noqa: BLE001 - the others act; this one is built anew when it is asked again
                self._leave(slot)
                found[i] = error
                continue
            placed[slot] = ask
            self._last_used[slot] = next(self._clock)
        slots, left = sorted(placed), set[int]()

        def hear(slot: int, tokens: Sequence[int]) -> bool:
            ask, choice = placed[slot], self.deciding.choices.get(slot)
            if ask.hear is None or choice is None:  # not decided yet: a draft that the router looks at
                return False
            if ask.hear(ask.session, choice, tokens):
                left.add(slot)
            return slot in left

        for slot in slots:
            self.deciding.choices.pop(slot, None)
        self.batch.on_token = hear
        try:
            steps = self.batch.step(slots) if slots else []
        except BaseException:
            for slot in slots:  # their transcripts are in the midst of a step: they are built anew from what was played
                self._leave(slot)
            raise
        finally:
            self.batch.on_token = unheard
        actions = {
            id(placed[slot].session): self._left(slot) if slot in left else self._note(slot, placed[slot], taken)
            for slot, taken in zip(slots, steps, strict=True)
        }
        return [found[i] if i in found else actions[id(ask.session)] for i, ask in enumerate(asks)]

    def _left(self, slot: int) -> UserError:
        """The step is not taken: what was played before it is read again when the session comes back."""
        self._leave(slot)
        return UserError("nobody waits for this action any more")

    def _note(self, slot: int, ask: Ask, taken: Taken) -> Action:
        """The step, in the session and as it is told."""
        session, choice, written = ask.session, self.deciding.choices[slot], taken.draft.action
        prompter, steps = self.batch.prompter, session.trajectory.steps
        if steps:
            steps[-1] = replace(steps[-1], observation=ask.observation)
        else:
            session.trajectory.opening = ask.observation
        decision = taken.decision
        step = taken.carried_out(prompter.command(written), "", prompter.parse_failure(written))
        switched = bool(steps) and steps[-1].precision != step.precision
        steps.append(step)
        cost = self.rollouts.cost(Trajectory(session.trajectory.run, "", [step]), session.decider.router).total
        left = session.cost_left
        session.spend += self.rollouts.acting.spend[step.precision]
        session.cost, session.margin = session.cost + cost, taken.draft.margin
        held = len(self.batch.slots[slot].transcript.tokens) - len(step.action)
        asked = was_asked(choice, session.decider)
        action = Action(
            step.command,
            prompter.thought_text(step.action),
            step.precision,
            decision.exceedance[0] if asked and decision.exceedance else None,
            choice.threshold if asked else None,
            choice.reason,
            choice.release,
            choice.propensity,
            session.turn,
            switched,
            held,
            max(0, held - max(1, step.reading.tokens - len(step.action) + 1)),
            len(step.action),
            cost,
            self._cost_at_dearest(step, held),
            step.failure != "unfinished",
            left,
        )
        session.answers.append(action.command)
        session.actions.append(action)
        return action

    def _segment(self, session: Session, observation: str) -> list[int]:
        done, limit = session.turn, self.rollouts.step_limit
        moment = Moment(done + 1, limit - done, session.admissible_commands)
        write = self.rollouts.prompter.turn if done else self.rollouts.prompter.opening
        return write(observation, session.task.instruction, moment)

    def _slot_of(self, session: Session) -> int | None:
        return next((slot for slot, its in self.deciding.sessions.items() if its is session), None)

    def _free_slot(self, busy: set[int]) -> int:
        """One that is empty, or whose session has not acted for longest and goes."""
        free = [slot for slot in range(self.slots) if slot not in self.deciding.sessions and slot not in busy]
        if free:
            return free[0]
        slot = min(
            (slot for slot in range(self.slots) if slot not in busy), key=lambda slot: self._last_used.get(slot, -1)
        )
        evicted = self.deciding.sessions[slot]
        evicted.held = self._leave(slot)
        return slot

    def _leave(self, slot: int) -> OpenTranscript | None:
        self.deciding.forget(slot)
        return self.batch.end(slot) if slot in self.batch.slots else None

    def _place(self, session: Session, slot: int, segment: list[int]) -> None:
        """The session in its slot, with a segment that comes next.

        Raises:
            UserError: there is no room for a step after it; then it is in no slot.
        """
        steps, run = session.trajectory.steps, session.trajectory.run
        if self.deciding.sessions.get(slot) is not session:
            self.deciding.sessions[slot] = session
            if session.held is not None:
                self.batch.resume(slot, session.held)
                session.held = None
                self.deciding.begin(slot, run)
            else:
                try:
                    self.batch.begin(slot, run, steps[0].segment if steps else segment, session.admissible_commands)
                except UserError:
                    self._leave(slot)
                    raise
                for step, after in zip(steps, [*(step.segment for step in steps[1:]), segment], strict=False):
                    self.batch.follow(slot, step.action, session.margin, step.precision)
                    self.batch.go_on(slot, after)
        if not self.batch.go_on(slot, segment):
            session.held = self._leave(slot)
            raise UserError(
                f"the transcript has room for {self.batch.capacity} tokens (agent.max_transcript_tokens), and none for another"
                " step: post the episode's outcome, and begin another one"
            )

    def _cost_at_dearest(self, step: Step, held: int) -> float:
        reading = Reading(tokens=len(step.segment)) + one_by_one(held, len(step.action))
        acting = self.rollouts.acting
        read = bytes_read(reading, acting.pass_bytes[acting.dearest], self.rollouts.cache_bits)
        return read.total / self.rollouts.unit_bytes

    def _worst_cost(self, session: Session, rung: str, drafter: str | None) -> float:
        """Of the next step if this rung acts, at most: it reads the whole transcript and writes the longest action, looked up in
        vain, and the cheapest one has read the transcript, and drafted, for the decision. Where it checks, each draft is as long
        as may be, and its first token alone is taken."""
        rollouts, held = self.rollouts, self.batch.capacity
        slot = self._slot_of(session)
        most = self.batch.prompter.prompt.max_action_tokens
        if slot is not None:
            held = len(self.batch.slots[slot].transcript.tokens)
        acting, lookup = rollouts.acting, rollouts.prompt_lookup.tokens if rollouts.prompt_lookup is not None else 0
        whole = Reading(tokens=held) + one_by_one(held, most) + Reading(0, most * lookup, most * lookup)
        reading = dict.fromkeys((rung, acting.cheapest), whole)
        if drafter is not None:
            longest = self.batch.speculative.draft_tokens or most
            rounds = [
                Round(
                    done, count, count, 0, one_by_one(held + done, count) + Reading(0, count * lookup, count * lookup)
                )
                for done, count in ((done, min(longest, most - done)) for done in range(most))
            ]
            reading[rung] = Reading(tokens=held) + checking(held, rounds)
            drafted = Reading(tokens=held) + drafting(rounds)
            reading[drafter] = drafted + (whole if drafter == acting.cheapest else NOTHING)
        read = [bytes_read(its, acting.pass_bytes[one], rollouts.cache_bits).total for one, its in reading.items()]
        if session.decider.router is not None:
            read.append(bytes_read(Reading(1, held, held), session.decider.router, rollouts.cache_bits).total)
        return sum(read) / rollouts.unit_bytes


def rule_decider(name: str, rollouts: Rollouts) -> Decider:
    """
    Args:
        name: as of `rule_at_bar`.
    """
    there = rules(rollouts.route, rollouts.step_limit, rollouts.prompter, rollouts.can_draft, seed=0)
    policy = rule_at_bar(name, there, rollouts.route)
    return Decider(policy, "rule", threshold=policy.bar.threshold, bar=policy.bar)


def refuse_untold(prompter: Prompter) -> None:
    """Of steps that were taken elsewhere it is not known what could be done at each.

    Raises:
        UserError: the recipe's prompt tells it.
    """
    if "admissible_commands" in prompter.named:
        raise UserError(
            "this conversation does not go on here, and the recipe's prompt tells what can be done at each step, which is"
            " not known of its past: begin another session with the episode's first observation"
        )


def _limited(prompter: Prompter, most: int) -> Prompter:
    """With actions of so many tokens at most."""
    if most == prompter.prompt.max_action_tokens:
        return prompter
    return replace(prompter, prompt=prompter.prompt.model_copy(update={"max_action_tokens": most}))
