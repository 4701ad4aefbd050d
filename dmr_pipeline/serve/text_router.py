"""A router that reads text, for agents whose models run elsewhere: it decides, and nothing here acts."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.policy import Decision, Draft, certain
from dmr_pipeline.rollout.prompts import Moment, Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Step, Trajectory
from dmr_pipeline.router.model import Router, load_router, read_settings
from dmr_pipeline.serve.deciders import Deciders
from dmr_pipeline.serve.deciding import Deciding
from dmr_pipeline.serve.local import Ask, Turn, refuse_untold
from dmr_pipeline.serve.sessions import Budget, Choice, Decider, Session, spent
from dmr_pipeline.serve.settings import ServeSettings

log = logging.getLogger(__name__)
T = TypeVar("T")


class TextRouter:
    """Sessions of agents behind upstreams, as a router reads them. One thread of its own decides."""

    def __init__(self, settings: ServeSettings, recipe: Recipe) -> None:
        ladder = [rung.name for rung in recipe.precisions.ladder]
        if unknown := [rung for rung in settings.upstreams if rung not in ladder]:
            raise UserError(f"--upstream {unknown[0]}: the recipe's ladder has no such rung ({', '.join(ladder)})")
        if len(settings.upstreams) < 2:
            raise UserError("--upstream: name two precisions at least, RUNG=URL each, or none to act in this process")
        self.route = tuple(rung for rung in ladder if rung in settings.upstreams)
        self._recipe, self._seconds, self._slots = recipe, settings.router_seconds, settings.slots
        self._prompter: Prompter | None = None
        steps = len(self.route) - 1
        spend = {rung: (steps - i) / steps for i, rung in enumerate(self.route)}
        self.fallback = self.route[-1] if settings.low_on_failure else self.route[0]
        self.deciding = Deciding(self.route, spend, lambda *_: 0.0, self.fallback, settings.epsilon, settings.seed)
        self.deciders = Deciders(
            settings.recipe, settings.data_root, self.route, self._load, settings.slots, router=settings.router
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deciding")
        self._last_used: dict[int, int] = {}
        self._clock = count()

    def open(self, name: str, run: RolloutRequest, decider: Decider, budget: Budget, past: Sequence[Turn]) -> Session:
        """
        Raises:
            UserError: a cost is asked for, which is not known of what acts elsewhere; or as of `refuse_untold`.
        """
        if budget.cost is not None:
            raise UserError("cost: what upstreams spend is not known here; ask for a high_ratio")
        if past and self._prompter is not None:
            refuse_untold(self._prompter)
        session = Session(name, Trajectory(run, past[0].observation if past else ""), decider, budget)
        for turn, done in enumerate(past):
            segment = self._segment(session, done.observation)
            shown = past[turn + 1].observation if turn + 1 < len(past) else ""
            session.trajectory.steps.append(
                self._step(segment, done.command, shown, done.precision or self.route[0], ())
            )
            session.answers.append(done.command)
        session.spend = spent(session.trajectory.steps, self.deciding.spend)
        return session

    async def choose(self, ask: Ask) -> tuple[Choice, bool]:
        """What acts at this turn, and whether the router failed or took too long: then it is the fallback."""
        deciding, session = self.deciding, ask.session
        try:
            async with asyncio.timeout(self._seconds):
                return await self._in_thread(lambda: self._choose(ask))
        except TimeoutError:
            log.warning("the router took more than %g s, %s acts", self._seconds, self.fallback)
            decision = Decision(self.fallback, certain(self.fallback, self.route))
            choice = Choice(decision, "fallback", 1.0, session.decider.release, session.decider.threshold)
            return deciding.within_budget(session, choice, {}), True

    async def decide(self, ask: Ask) -> Choice:
        choice, _ = await self._in_thread(lambda: self._choose(ask, keep=False))
        return choice

    def acted(self, ask: Ask, precision: str, choice: Choice, command: str) -> None:
        """The session has taken its step."""
        session, steps = ask.session, ask.session.trajectory.steps
        segment = self._segment(session, ask.observation)
        if steps:
            steps[-1] = replace(steps[-1], observation=ask.observation)
        else:
            session.trajectory.opening = ask.observation
        step = self._step(segment, command, "", precision, choice.decision.exceedance)
        steps.append(step)
        session.answers.append(command)
        session.spend += self.deciding.spend[precision]
        self._thread.submit(self._tell, session, step)

    def undo(self, session: Session) -> None:
        """Its last step was not received, and is taken again."""
        step = session.trajectory.steps.pop()
        for kept in (session.answers, session.actions):
            kept.pop()
        session.spend -= self.deciding.spend[step.precision]
        self._thread.submit(self._leave, session)

    async def close(self, session: Session) -> None:
        self.forget(session)

    def forget(self, session: Session) -> None:
        self._thread.submit(self._leave, session)

    def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self, folder: Path) -> Router:
        settings = read_settings(folder)
        if settings.kind == "probe" or settings.decides == "after":
            looks = "hidden states" if settings.kind == "probe" else "drafts"
            raise UserError(
                f"router {folder} looks at the {looks} of an agent that acts in this process, which upstreams do not show: leave"
                " --upstream out, or train one that reads text (kl_router.model: encoder, architecture or pretrained)"
            )
        if settings.route != self.route:
            raise UserError(
                f"router {folder} chooses from {', '.join(settings.route)}: give one --upstream for each of them"
            )
        router = load_router(folder, torch.device("cpu"))
        # Sessions keep their texts as tokens, which whoever decides next reads too.
        if self._prompter is not None and self._prompter.tokenizer.get_vocab() != router.tokenizer.get_vocab():
            raise UserError(
                f"router {folder} reads other tokens than the one that decides here: start the server again"
            )
        self._prompter = Prompter.of(router.tokenizer, self._recipe.agent.prompt)
        return router

    def _choose(self, ask: Ask, keep: bool = True) -> tuple[Choice, bool]:
        session, deciding = ask.session, self.deciding
        session.admissible = ask.admissible
        slot = self._slot(session) if keep else self._slots
        if deciding.sessions.get(slot) is not session:
            deciding.sessions[slot] = session
            deciding.begin(slot, session.trajectory.run)
        failures = deciding.failures  # only this thread counts them
        deciding.decide([slot], [self._segment(session, ask.observation)], _Nothing(session))
        choice = deciding.choices[slot]
        if not keep:
            self._leave(session)
        return choice, deciding.failures > failures

    def _tell(self, session: Session, step: Step) -> None:
        slot = self._slot_of(session)
        if slot is not None:
            self.deciding.acted(slot, step.segment, step.precision, step.action)

    def _slot(self, session: Session) -> int:
        slot = self._slot_of(session)
        if slot is None:
            free = [slot for slot in range(self._slots) if slot not in self.deciding.sessions]
            slot = free[0] if free else min(range(self._slots), key=lambda slot: self._last_used.get(slot, -1))
        self._last_used[slot] = next(self._clock)
        return slot

    def _slot_of(self, session: Session) -> int | None:
        return next((slot for slot, its in self.deciding.sessions.items() if its is session), None)

    def _leave(self, session: Session) -> None:
        slot = self._slot_of(session)
        if slot is not None:
            self.deciding.forget(slot)

    def _segment(self, session: Session, observation: str) -> list[int]:
        """As the recipe's own agent reads it; nothing where no router is there to read it."""
        if self._prompter is None:
            return []
        done, limit = session.turn, self._recipe.benchmark.step_limit
        write = self._prompter.turn if done else self._prompter.opening
        return write(observation, session.task.instruction, Moment(done + 1, limit - done, session.admissible_commands))

    def _step(
        self, segment: list[int], command: str, shown: str, precision: str, exceedance: tuple[float, ...]
    ) -> Step:
        action = [] if self._prompter is None else self._prompter.action(command)
        return Step(segment, action, command, shown, precision, exceedance)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(work))


class _Nothing:
    """What a router can look at besides the text: the admissible commands, where they were told."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def can_check(self) -> bool:
        return False

    def drafts(self, precision: str, slots: Sequence[int]) -> list[Draft]:
        self._refuse()

    def states(self, slots: Sequence[int], layers: Sequence[int]) -> Tensor:
        self._refuse()

    def margins(self, slots: Sequence[int]) -> list[float]:
        self._refuse()

    def command(self, action: list[int]) -> str:
        self._refuse()

    def admissible_commands(self, slots: Sequence[int]) -> list[Sequence[str]]:
        return [self._session.admissible_commands() for _ in slots]

    def _refuse(self) -> NoReturn:
        raise UserError("nothing acts here")
