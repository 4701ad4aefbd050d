"""Transcripts that are acted on together: at each step a policy decides which precision acts, and that one writes the action.

Each precision keeps its own exact cache (`TokenStreams`) and catches up, when its turn comes, on the tokens it has not seen; what
an oracle has let it read, for nothing, counts as not seen. Or all have one (`SharedStreams`):

- Each goes on from what was read before, whoever has read it. What a policy asks for is read into the cache too, and stays
  there as far as it is the transcript's; drafts that are thrown away are cut.
- Who acts reads the transcript's last token itself, since its pass tells what comes next.
- A step that is checked is as if who checks had written it, what is left in the cache too: it reads all that is new in this
  step, in the place of what the drafter has read.
- An oracle knows for nothing: what it has asked for leaves no trace, and who acts does so from where the step began.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.precisions import PromptLookup, Speculative
from dmr_pipeline.rollout.choosing import drawn, entropies, leads, seeded_generator
from dmr_pipeline.rollout.failures import Failure
from dmr_pipeline.rollout.known import Drafting, Known, KnownAction, Transcript
from dmr_pipeline.rollout.kv_cache.catching_up import catch_up
from dmr_pipeline.rollout.kv_cache.padded import TokenStreams
from dmr_pipeline.rollout.kv_cache.shared import SharedStreams
from dmr_pipeline.rollout.policy import Decision, Draft, RoutingPolicy
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.reading import NOTHING, Reading, checking, drafting, each_in_full, one_by_one
from dmr_pipeline.rollout.speculation import write_checked
from dmr_pipeline.rollout.trail import Trail, digest
from dmr_pipeline.rollout.trajectory import RolloutRequest, Step
from dmr_pipeline.rollout.writing import Guess, NgramGuesses, looked_up, write


@dataclass
class Timings:
    """Seconds spent, over a whole batch of episodes; differs from run to run."""

    router: float = 0.0
    agent: float = 0.0
    environment: float = 0.0
    durations: list[float] = field(default_factory=list)
    """Router and agent together, of each step of the whole batch."""
    steps: int = 0

    def add(self, other: "Timings") -> None:
        """The seconds of another batch of episodes; of batches that ran at the same time, each counts in full."""
        self.router += other.router
        self.agent += other.agent
        self.environment += other.environment
        self.durations += other.durations
        self.steps += other.steps


@dataclass(frozen=True)
class Taken:
    """A step of a transcript that is not carried out yet."""

    segment: list[int]
    """As `Step.segment`."""
    decision: Decision
    draft: Draft
    """Of the precision that acts."""
    besides: Mapping[str, Reading]
    """As `Step.besides`."""

    def carried_out(self, command: str, observation: str, failure: Failure | None) -> Step:
        """The step, once it is known what became of its command."""
        decision, drafting = self.decision, self.draft.drafting
        return Step(
            self.segment,
            self.draft.action,
            command,
            observation,
            decision.precision,
            decision.exceedance,
            self.draft.reading,
            self.besides,
            decision.router,
            decision.features,
            decision.forced,
            drafting.drafted if drafting else 0,
            drafting.accepted if drafting else 0,
            failure,
        )


@dataclass
class OpenTranscript:
    """A transcript that is acted on, and what is known of it in this step."""

    run: RolloutRequest
    admissible_commands: Callable[[], Sequence[str]]
    """Where the transcript ends."""
    segment: list[int]
    trails: Mapping[str, Trail]
    """Precision -> what its cache has read; the same one for all where they have one cache."""
    turn: int = 0
    """Steps taken."""
    margin: float = 1.0
    """Of the last action."""
    transcript: Transcript = field(default_factory=Transcript)
    looked: Reading | None = None
    """Where the cheapest precision has read the transcript in this step for its states, and no action has gone on from there."""
    fresh: bool = False
    """Whether it still could: nobody has read into that cache since."""

    def begin_step(self) -> None:
        self.transcript.append(self.segment)
        for trail in self.trails.values():
            trail.begin_step()
        self.looked, self.fresh = None, False

    def rewind(self) -> None:
        """As if nothing had been asked for in this step."""
        for trail in self.trails.values():
            trail.rewind()
        self.looked, self.fresh = None, False


def unheard(slot: int, action: Sequence[int]) -> bool:
    """Nobody is told of what is written, and it is written to the end."""
    return False


class Batch:
    """Transcripts that are acted on together. Whoever carries the actions out appends what they showed."""

    def __init__(
        self,
        agents: Mapping[str, TokenStreams],
        prompter: Prompter,
        policy: RoutingPolicy,
        action: Literal["generate", "score"],
        temperature: float,
        seed: int,
        clock: Timings,
        known: Known | None,
        speculative: Speculative,
        prompt_lookup: PromptLookup | None = None,
    ) -> None:
        """
        Raises:
            UserError: actions are to be looked up where commands are scored, or by a model whose cache cannot be cut.
        """
        self.agents, self.prompter, self.policy, self.known = agents, prompter, policy, known
        self.speculative, self.prompt_lookup = speculative, prompt_lookup
        if prompt_lookup is not None:
            _refuse_lookup(agents, action)
        self._cheapest = list(agents)[-1]
        self._readers = {rung: reader for reader, rung in enumerate(agents)}
        """By which `SharedStreams` know them."""
        self.capacity = min(streams.capacity for streams in agents.values())
        self.scores = action == "score"
        self.temperature, self.seed, self.clock = temperature, seed, clock
        self.slots: dict[int, OpenTranscript] = {}
        self.on_token: Callable[[int, Sequence[int]], bool] = unheard
        """Slot and what is written of its action, after each token that does not complete it, where one precision writes alone;
        drafts for a decision too. Returns whether nobody waits for more: then it ends there."""
        self._guesses = NgramGuesses()
        self._after: dict[int, Tensor] = {}
        """Where the cheapest precision has read the transcript in this step: logits [vocabulary] after it."""

    def begin(
        self, slot: int, run: RolloutRequest, segment: list[int], admissible_commands: Callable[[], Sequence[str]]
    ) -> None:
        """A new transcript in this slot.

        Args:
            segment: the opening's tokens.
            admissible_commands: what can be done where the transcript ends, whenever it is asked.

        Raises:
            UserError: its first step does not fit.
        """
        one = Trail()
        trails = {rung: one if self._share else Trail() for rung in self.agents}
        self.slots[slot] = OpenTranscript(run, admissible_commands, segment, trails)
        needed = self._needed(self.slots[slot])
        if needed > self.capacity:
            raise UserError(
                f"task {run.task.task_id}: its first step needs {needed} tokens, a transcript may have {self.capacity}: set"
                " agent.max_transcript_tokens higher, or show less of a page (agent.prompt.page)"
            )
        self.policy.begin(slot, run)

    def go_on(self, slot: int, segment: list[int]) -> bool:
        """What the last action showed, as tokens. Returns whether there is room for a step after it."""
        self.slots[slot].segment = segment
        return self._needed(self.slots[slot]) <= self.capacity

    def end(self, slot: int) -> OpenTranscript:
        """The transcript leaves its slot, which is free for another one."""
        return self.slots.pop(slot)

    def resume(self, slot: int, transcript: OpenTranscript) -> None:
        """One that has left its slot goes on in a free one, its caches as far as they are still there. The policy must have
        been told of it again."""
        self.slots[slot] = transcript

    def follow(self, slot: int, action: list[int], margin: float, precision: str) -> None:
        """A step of this transcript was taken elsewhere, or is read again. The policy is not told.

        Args:
            precision: that acted, and so has read it where there is one cache; of others, and of one that is not known here, all
                is read by who acts next.
        """
        state = self.slots[slot]
        state.begin_step()
        if self._share and precision in self._readers:
            state.trails[precision].read(self._readers[precision], len(state.transcript.tokens), len(action) - 1)
        state.transcript.append(action)
        state.turn += 1
        state.margin = margin

    def decide(self, slots: Sequence[int]) -> list[Decision]:
        """What the policy decides at these transcripts, with nothing written. They are of no further use."""
        self._after.clear()  # of a step that failed
        running = [self.slots[slot] for slot in slots]
        for state in running:
            state.begin_step()
        decisions = self.policy.decide(slots, [state.segment for state in running], _BatchPeek(self))
        self._after.clear()
        return decisions

    @property
    def _share(self) -> bool:
        """Whether the precisions have one cache."""
        return isinstance(self.agents, SharedStreams)

    def _needed(self, state: OpenTranscript) -> int:
        """Tokens of the transcript once the next step has been taken, at most."""
        longest = self.prompter.prompt.max_action_tokens
        if self.scores:
            commands = state.admissible_commands()
            longest = max([longest, *(len(self.prompter.action(command)) for command in commands)])
        return len(state.transcript.tokens) + len(state.segment) + longest

    def step(self, slots: Sequence[int]) -> list[Taken]:
        """One step of each of these transcripts: decided, written and appended."""
        self._after.clear()  # of a step that failed
        running = [self.slots[slot] for slot in slots]
        for state in running:
            state.begin_step()
        peek = _BatchPeek(self)
        started = time.perf_counter()
        decisions = self.policy.decide(slots, [state.segment for state in running], peek)
        decided = time.perf_counter()
        for slot, state, decision in zip(slots, running, decisions, strict=True):
            if not decision.charged:
                if self._share:
                    state.rewind()
                    self._after.pop(slot, None)
                    peek.forget(slot)
                else:
                    for rung in state.trails.keys() - {decision.precision}:
                        state.trails[rung].rewind()
            held = len(state.transcript.tokens)
            for trail in state.trails.values():
                if len(trail) > held and trail.readers[-1] != self._readers[decision.precision]:
                    trail.cut(held)  # its action is thrown away
        charged = {slot for slot, decision in zip(slots, decisions, strict=True) if decision.charged}
        chosen: dict[int, Draft] = {}
        for precision in reversed(list(self.agents)):
            drafters = {
                slot: decision.drafter
                for slot, decision in zip(slots, decisions, strict=True)
                if decision.precision == precision
            }
            drafted = peek.drafted.get(precision, {})
            chosen |= {slot: drafted[slot] for slot in drafters if slot in drafted}
            for drafter in dict.fromkeys(drafters.values()):
                rest = [slot for slot, its in drafters.items() if its == drafter and slot not in drafted]
                ready = self._ready(drafter, peek, [slot for slot in rest if slot in charged])
                for some in (list(ready), [slot for slot in rest if slot not in ready]):
                    if some:
                        acted_now = self.act(precision, some, drafter, [ready[slot] for slot in some if slot in ready])
                        chosen |= dict(zip(some, acted_now, strict=True))
        steps = [
            Taken(state.segment, decision, chosen[slot], self._besides(slot, decision, chosen[slot], peek))
            for slot, state, decision in zip(slots, running, decisions, strict=True)
        ]
        self._after.clear()
        for slot, state, taken in zip(slots, running, steps, strict=True):
            state.transcript.append(taken.draft.action)
            state.turn += 1
            state.margin = taken.draft.margin
            self.policy.acted(slot, taken.segment, taken.decision.precision, taken.draft.action)
        acted = time.perf_counter()
        self.clock.router += decided - started
        self.clock.agent += acted - decided
        self.clock.durations.append(acted - started)
        self.clock.steps += len(slots)
        return steps

    def _besides(self, slot: int, decision: Decision, taken: Draft, peek: "_BatchPeek") -> dict[str, Reading]:
        """`Step.besides`: drafts that were not taken, a reading of the transcript that no action went on from, and what the
        acting precision checked."""
        besides: dict[str, Reading] = {}
        drafter = decision.drafter if taken.drafting is not None else None
        if decision.charged:
            besides = {
                precision: drafted[slot].reading
                for precision, drafted in peek.drafted.items()
                if precision != decision.precision and slot in drafted
            }
            if (looked := self.slots[slot].looked) is not None:
                besides[self._cheapest] = besides.get(self._cheapest, NOTHING) + looked
        if drafter is not None and taken.drafting is not None:
            besides[drafter] = besides.get(drafter, NOTHING) + taken.drafting.reading
        return besides

    def read_states(self, slots: Sequence[int], layers: Sequence[int]) -> Tensor:
        """`DecisionContext.states`; what is read here is not read again by an action of this step."""

        def read(new: list[int]) -> Sequence[NDArray[np.float32]]:
            logits, states = self.agents[self._cheapest].read(new, self._unread(self._cheapest, new), layers)
            self._after |= zip(new, logits, strict=True)
            return list(states.cpu().numpy())

        if self.known is None:
            rows = read(list(slots))
        else:
            keys = {slot: (tuple(layers), self._place(slot, self._cheapest)) for slot in slots}
            rows = self.known.fill(self.known.states, keys, read)
        for slot in slots:
            state = self.slots[slot]
            held = len(state.transcript.tokens)
            unread = state.trails[self._cheapest].read(self._readers[self._cheapest], held)
            state.looked, state.fresh = Reading(1, unread, held), True
        return torch.from_numpy(np.stack(rows))

    def _place(self, slot: int, precision: str, drafter: str | None = None, ready: Sequence[int] = ()) -> bytes:
        """All that a precision's action depends on: a digest of the transcript, of the draft that is there already, if any, and,
        with one cache, of who has read the transcript."""
        state = self.slots[slot]
        place = state.transcript.digest() + np.asarray(ready, np.int64).tobytes()
        if not self._share:
            return place
        held, trail = len(state.transcript.tokens), state.trails[precision]
        if drafter is None:
            return place + digest(trail.after(self._readers[precision], held))
        return place + digest(trail.after(self._readers[drafter], held), trail.before)

    def _ready(self, drafter: str | None, peek: "_BatchPeek", slots: Sequence[int]) -> dict[int, list[int]]:
        """Slot -> what the drafter would do there, where that was asked for. A draft that is drawn is not used: its logits, by
        which it would be checked, are not kept."""
        if drafter is None or self.temperature > 0:
            return {}
        drafted = peek.drafted.get(drafter, {})
        return {slot: drafted[slot].action for slot in slots if slot in drafted}

    def act(
        self, precision: str, slots: list[int], drafter: str | None = None, ready: Sequence[list[int]] = ()
    ) -> list[Draft]:
        """The action of one precision for each slot.

        Args:
            drafter: as `Decision.drafter`.
            ready: for each slot the draft that is checked first, if it is there already.

        Raises:
            UserError: it cannot be checked what is drafted.
        """
        if drafter is not None:
            self._refuse_drafting(precision, drafter)
        drafts = []
        for slot, taken in zip(slots, self._actions(precision, drafter, slots, ready), strict=True):
            took = taken.drafting
            if drafter is not None and took is not None:
                grown = self._grown(slot, drafter, took.kept)
                if not ready:
                    took = replace(took, reading=grown + took.reading)
                self.slots[slot].trails[precision].rewind()
            reading = self._grown(slot, precision, taken.kept) + taken.reading
            drafts.append(Draft(taken.tokens, reading, taken.margin, took, taken.mean_margin, taken.entropy))
        return drafts

    def _grown(self, slot: int, precision: str, kept: int) -> Reading:
        """Of what the transcript has grown by since it was last read into this precision's cache, where there are then so many
        tokens more."""
        state = self.slots[slot]
        unread = state.trails[precision].read(self._readers[precision], len(state.transcript.tokens), kept)
        if state.looked is not None and state.fresh and precision == self._cheapest:
            unread, state.looked = state.looked.tokens, None
        if self._share or precision == self._cheapest:
            state.fresh = False
        return Reading(tokens=unread)

    def _refuse_drafting(self, precision: str, drafter: str) -> None:
        if list(self.agents).index(drafter) <= list(self.agents).index(precision):
            raise ValueError(f"{drafter!r} cannot draft for {precision!r}: it is not cheaper")
        if self.scores:
            raise UserError(
                f"{drafter!r} is to draft for {precision!r}, but with agent.action: score nothing is written; set it to"
                " generate, or act without drafts"
            )
        for rung in (precision, drafter):
            if not self.agents[rung].cuts:
                raise UserError(
                    f"{drafter!r} is to draft for {precision!r}, but the cache of {rung!r} cannot be cut where a draft was wrong;"
                    " act without drafts"
                )

    def _actions(
        self, precision: str, drafter: str | None, slots: list[int], ready: Sequence[list[int]]
    ) -> list[KnownAction]:
        """Looked up or computed; arguments as of `act`."""
        drafts = dict(zip(slots, ready, strict=True)) if ready else {}

        def compute(new: list[int]) -> list[KnownAction]:
            computed.extend(new)
            if drafter is not None:
                return self._check(precision, drafter, new, [drafts[slot] for slot in new if drafts])
            return self._score(precision, new) if self.scores else self._generate(precision, new)

        computed: list[int] = []
        if self.known is None:
            return compute(slots)
        keys = {
            slot: (precision, drafter, self._place(slot, precision, drafter, drafts.get(slot, ()))) for slot in slots
        }
        actions = self.known.fill(self.known.actions, keys, compute)
        self.known.asked += len(slots)
        self.known.looked_up += len(slots) - len(computed)
        return actions

    def _unread_of_step(self, precision: str, slots: Sequence[int]) -> list[list[int]]:
        """Tokens of each transcript that the one cache of all is still to read, as if nothing had been asked for in this step."""
        assert isinstance(self.agents, SharedStreams)
        states = [self.slots[slot] for slot in slots]
        texts = [state.transcript.tokens for state in states]
        return self.agents.catch_up(precision, slots, texts, [state.trails[precision].before for state in states])

    def _unread(self, precision: str, slots: Sequence[int]) -> list[list[int]]:
        """Tokens of each transcript that its stream is still to read; none where it was read in this step."""
        read = self._after if precision == self._cheapest else {}
        for slot in slots:
            if slot in read:  # and perhaps drafted after it
                self.agents[precision].truncate(slot, len(self.slots[slot].transcript.tokens))
        new = [slot for slot in slots if slot not in read]
        texts = [self.slots[slot].transcript.tokens for slot in new]
        if isinstance(self.agents, SharedStreams):
            trails = [self.slots[slot].trails[precision].readers for slot in new]
            left = self.agents.catch_up(precision, new, texts, trails)
            if precision != self._cheapest:
                for slot in new:
                    self._after.pop(slot, None)
        else:
            left = catch_up(self.agents[precision], new, texts)
        chunks = dict(zip(new, left, strict=True))
        return [chunks.get(slot, []) for slot in slots]

    def _generate(self, precision: str, slots: list[int]) -> list[KnownAction]:
        """Token by token."""
        transcripts = [self.slots[slot].transcript.tokens for slot in slots]
        written = write(
            self.agents[precision],
            slots,
            self._unread(precision, slots),
            choose=lambda logits, places: self._choose(logits, [(slots[i], index) for i, index in places]),
            observe=lambda logits: list(zip(leads(logits), entropies(logits), strict=True)),
            guess=self._guess_after(transcripts),
            is_complete=self.prompter.is_complete,
            known=self._logits_after(precision, slots),
            stop=lambda i, so_far, _: self.on_token(slots[i], so_far),
        )
        actions = []
        for transcript, action in zip(transcripts, written, strict=True):
            self._guesses.learn(transcript, action.tokens)
            count = len(action.tokens)
            reading = action.reading if self.prompt_lookup else one_by_one(len(transcript), count)
            lead, entropy = zip(*action.facts, strict=True)
            actions.append(
                KnownAction(action.tokens, min(lead), fmean(lead), reading, kept=count - 1, entropy=max(entropy))
            )
        return actions

    def _check(self, precision: str, drafter: str, slots: list[int], ready: Sequence[list[int]]) -> list[KnownAction]:
        """What the drafter writes, as far as this precision would write it too; arguments as of `act`."""
        transcripts = [self.slots[slot].transcript.tokens for slot in slots]
        unread_by_drafter = [[]] * len(slots) if ready else self._unread(drafter, slots)
        if not self._share:
            unread = self._unread(precision, slots)
        elif ready:
            unread = self._unread_of_step(precision, slots)
        else:
            begun = [len(self.slots[slot].trails[precision].before) for slot in slots]
            unread = [transcript[start:] for transcript, start in zip(transcripts, begun, strict=True)]
        checked = write_checked(
            self.agents[precision],
            self.agents[drafter],
            slots,
            transcripts,
            unread,
            unread_by_drafter,
            self._logits_after(drafter, slots),
            self._guess_after(transcripts),
            self.prompter.is_complete,
            self.speculative,
            self.temperature,
            lambda i, index, *purpose: self._draw(slots[i], index, *purpose),
            self._share,
            ready,
            guesses_count=self.prompt_lookup is not None,
        )
        actions = []
        for transcript, action in zip(transcripts, checked, strict=True):
            self._guesses.learn(transcript, action.tokens)
            held, rounds = len(transcript), action.rounds
            drafted, accepted = sum(r.drafted for r in rounds), sum(r.agreed for r in rounds)
            took = Drafting(drafted, accepted, drafting(rounds, self._share, bool(ready)), rounds[-1].kept)
            kept = len(action.tokens) - 1
            margins = min(action.leads), fmean(action.leads)
            actions.append(KnownAction(action.tokens, *margins, checking(held, rounds), kept, took))
        return actions

    def _guess_after(self, transcripts: Sequence[list[int]]) -> Guess:
        most = self.prompter.prompt.max_action_tokens

        def guess(before: list[int], written: list[int]) -> list[int]:
            room = most - len(written) - 1
            if self.prompt_lookup is None:
                return self._guesses.guess(before, written, room)
            # None in the pass that reads an observation: it may be over before it is known who acts.
            return looked_up([*before, *written], self.prompt_lookup)[:room] if written else []

        return lambda waiting: {i: guess(transcripts[i], tokens) for i, tokens in waiting.items()}

    def _logits_after(self, precision: str, slots: Sequence[int]) -> dict[int, Tensor]:
        """Place among `slots` -> logits [vocabulary] after the transcript, where it was read in this step."""
        read = self._after if precision == self._cheapest else {}
        return {i: read[slot] for i, slot in enumerate(slots) if slot in read}

    def _score(self, precision: str, slots: list[int]) -> list[KnownAction]:
        """The admissible command that is likeliest, or a draw by probability."""
        streams = self.agents[precision]
        candidates = [
            [self.prompter.action(command) for command in self.slots[slot].admissible_commands()] for slot in slots
        ]
        after = dict(self._after) if precision == self._cheapest else {}
        if new := [slot for slot in slots if slot not in after]:
            after |= dict(zip(new, streams.extend(new, self._unread(precision, new)), strict=True))
        first = torch.stack([after[slot] for slot in slots]).log_softmax(-1)
        scores: list[list[float]] = [[] for _ in slots]
        for k in range(max(len(commands) for commands in candidates)):
            mine = [i for i in range(len(slots)) if k < len(candidates[i])]
            begun = [candidates[i][k][:-1] for i in mine]
            sizes = [len(tokens) for tokens in begun]
            rest = streams.extend([slots[i] for i in mine], begun, sizes)
            for i, rows in zip(mine, rest.split(sizes), strict=True):
                command = candidates[i][k]
                following = rows.log_softmax(-1).gather(-1, torch.tensor(command[1:], device=rows.device)[:, None])
                scores[i].append(float(first[i, command[0]] + following.sum()))
                streams.truncate(slots[i], len(self.slots[slots[i]].transcript.tokens))
        actions = []
        for slot, commands, of_commands in zip(slots, candidates, scores, strict=True):
            values = torch.tensor([of_commands])
            chosen = self._choose(values, [(slot, 0)])[0]
            reading = each_in_full(len(self.slots[slot].transcript.tokens), [len(command) for command in commands])
            (margin,), (entropy,) = leads(values), entropies(values)
            actions.append(KnownAction(commands[chosen], margin, margin, reading, kept=0, entropy=entropy))
        return actions

    def _choose(self, logits: Tensor, positions: list[tuple[int, int]]) -> list[int]:
        """A token for each (slot, index in the action)."""
        if self.temperature == 0:
            return list(logits.argmax(-1).tolist())
        return drawn(logits / self.temperature, [self._draw(slot, index) for slot, index in positions])

    def _draw(self, slot: int, index: int, *purpose: str) -> float:
        """Uniform in [0, 1), for an index in the action of the slot's present step."""
        run, turn = self.slots[slot].run, self.slots[slot].turn
        return seeded_generator(self.seed, run.task.task_id, run.member, turn, index, *purpose).random()


class _BatchPeek:
    """`DecisionContext` into a batch, for one step."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.drafted: dict[str, dict[int, Draft]] = {}
        """Precision -> slot -> what it would do."""

    def forget(self, slot: int) -> None:
        """What it would do."""
        for drafted in self.drafted.values():
            drafted.pop(slot, None)

    def drafts(self, precision: str, slots: Sequence[int]) -> list[Draft]:
        there = self.drafted.setdefault(precision, {})
        if new := [slot for slot in slots if slot not in there]:
            there |= dict(zip(new, self._batch.act(precision, new), strict=True))
        return [there[slot] for slot in slots]

    def states(self, slots: Sequence[int], layers: Sequence[int]) -> Tensor:
        return self._batch.read_states(slots, layers)

    def admissible_commands(self, slots: Sequence[int]) -> list[Sequence[str]]:
        return [self._batch.slots[slot].admissible_commands() for slot in slots]

    def margins(self, slots: Sequence[int]) -> list[float]:
        return [self._batch.slots[slot].margin for slot in slots]

    def command(self, action: list[int]) -> str:
        return self._batch.prompter.command(action)

    @property
    def can_check(self) -> bool:
        return not self._batch.scores and all(streams.cuts for streams in self._batch.agents.values())


def _refuse_lookup(agents: Mapping[str, TokenStreams], action: Literal["generate", "score"]) -> None:
    if action == "score":
        raise UserError("precisions.prompt_lookup: with agent.action: score nothing is written; leave it out")
    for rung, streams in agents.items():
        if not streams.cuts:
            raise UserError(
                f"precisions.prompt_lookup: the cache of {rung!r} cannot be cut where a guess was wrong; leave it out"
            )
