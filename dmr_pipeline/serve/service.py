"""What a server does with a request, but for HTTP: sessions go on, are decided and acted on, and end with an outcome."""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.errors import UserError, printable, problems_of
from dmr_pipeline.ingestion.rules import Rules
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.serve.conversation import Conversation, read_conversation
from dmr_pipeline.serve.in_process import InProcess, refuse_other_wishes
from dmr_pipeline.serve.journal import Journal, episode_of
from dmr_pipeline.serve.local import Ask
from dmr_pipeline.serve.metrics import Metrics
from dmr_pipeline.serve.requests import ChatRequest, Options, Outcome, Which, budget_of
from dmr_pipeline.serve.sessions import Action, Asked, Choice, Decider, Goal, Session
from dmr_pipeline.serve.settings import ServeSettings
from dmr_pipeline.serve.streaming import Pieces, Stream, cut
from dmr_pipeline.serve.table import Held, Table, goes_on, is_repeated
from dmr_pipeline.serve.text_router import TextRouter
from dmr_pipeline.serve.unended import Unended

log = logging.getLogger(__name__)

_ENDED = 10_000
"""Sessions whose outcome is remembered, so that it can be posted again."""
STEP_SECONDS = 0.5
"""For steps that are under way once the server has stopped listening: it is given little more (interrupts.py, run.py)."""


class NotFound(UserError):
    """There is no such session or model."""


@dataclass(frozen=True)
class Answer:
    """An action as a client is told of it."""

    text: str
    action: Action
    session_id: str
    source: str
    """Of the session's name: given, or derived from what the conversation begins with."""
    stopped: bool
    """It ended by itself, or at one of the texts that the client has named."""


@dataclass
class Streamed:
    """An answer that is shown while it is written."""

    action: Action
    """As far as it is known once its first piece is there."""
    session_id: str
    source: str
    """As of `Answer`."""
    stream: Stream
    turn: asyncio.Task[Answer]
    first: str
    further: AsyncIterator[str]
    until: float
    """When the event loop's clock says this it has taken too long."""

    async def pieces(self) -> AsyncIterator[str]:
        """Of its text; `turn` is done after them.

        Raises:
            TimeoutError: it takes too long.
        """
        piece = self.first
        while piece:
            yield piece
            piece = await asyncio.wait_for(anext(self.further, ""), self.until - asyncio.get_running_loop().time())
        if rest := self.turn.result().text[len(self.stream.pieces.shown) :]:
            yield rest

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.stream.leave()


class Service:
    """
    Raises:
        UserError: an artifact of the recipe is missing.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings, self.recipe, self.metrics = settings, load_recipe(settings.recipe), Metrics()
        self.backend: InProcess | TextRouter = (
            TextRouter(settings, self.recipe) if settings.upstreams else InProcess(settings, self.recipe, self.metrics)
        )
        tasks = artifact_folder("benchmark_tasks", settings.recipe, settings.data_root)
        rules = Rules.of(self.recipe, tasks if tasks.is_dir() else None)
        self.journal = Journal(settings.recipe, settings.data_root, rules)
        self.unended = Unended(self.journal.folder)
        self.table = Table(settings.sessions, settings.session_seconds, self._ended_without_outcome, self.unended.take)
        self._ended: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._loading = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    async def decider(self, which: Which | None) -> Decider:
        """
        Raises:
            NotFound: no model of such a name.
        """
        deciders = self.backend.deciders
        if which is None:
            raise NotFound(f"there is no such model; there are {', '.join(deciders.names())}")
        if deciders.is_at_hand(which):
            return deciders.find(which)
        async with self._loading:
            before = deciders.current if which == Which() else None
            try:
                found = await asyncio.to_thread(deciders.find, which)
            except UserError as error:
                raise NotFound(str(error)) from error
        if before is not None and found is not before:
            self.metrics.count("dmr_releases_taken_up_total")
        return found

    async def chat(self, request: ChatRequest, which: Which | None, options: Options) -> Answer:
        """The session's next action. It is taken whether or not its client still waits, and told again if it asks again.

        Raises:
            UserError: why there is none.
            TimeoutError: it takes too long.
        """
        turn, _, _ = await self._started(request, which, options, None)
        async with asyncio.timeout(self.settings.request_seconds):
            return await asyncio.shield(turn)

    async def stream(self, request: ChatRequest, which: Which | None, options: Options) -> "Streamed":
        """As `chat`, once there is something to show of the answer. If its client leaves while it is written the step is not
        taken.

        Raises:
            UserError: why there is none.
            TimeoutError: it takes too long.
        """
        assert isinstance(self.backend, InProcess)
        stream = Stream(Pieces(self.backend.rollouts.prompter, request.stops))
        until = asyncio.get_running_loop().time() + self.settings.request_seconds
        turn, name, source = await self._started(request, which, options, stream)
        turn.add_done_callback(lambda _: stream.end())
        heard = stream.heard()
        try:
            async with asyncio.timeout_at(until):
                first = await anext(heard, "")
        except BaseException:
            stream.leave()
            raise
        action = turn.result().action if stream.begun is None else stream.begun
        return Streamed(action, name, source, stream, turn, first, heard, until)

    async def _started(
        self, request: ChatRequest, which: Which | None, options: Options, stream: Stream | None
    ) -> tuple[asyncio.Task[Answer], str, str]:
        """A turn; the session's name, and where that comes from."""
        refuse_other_wishes(bool(request.tools), request.n or 1)
        told = read_conversation(request.messages, options.task)
        decider = await self.decider(which)
        name, source = self.name_of(request, options, told)

        async def answer() -> Answer:
            text, action = await self._turn(request, told, decider, options, name, stream)
            return Answer(text, action, name, source, action.finished or text != action.command)

        turn = asyncio.create_task(answer())
        self._running.add(turn)
        turn.add_done_callback(self._ended_turn)
        return turn, name, source

    def _ended_turn(self, turn: asyncio.Task[Answer]) -> None:
        self._running.discard(turn)
        if not turn.cancelled():
            turn.exception()  # if its client has left nobody else asks

    def name_of(self, request: ChatRequest, options: Options, told: Conversation) -> tuple[str, str]:
        """The session's, and whether it is given or derived. Two episodes that begin alike at the same time have the same
        derived one."""
        if options.session_id is not None:
            return options.session_id, "given"
        return hashlib.sha256(f"{request.model} {told.fingerprint}".encode()).hexdigest()[:32], "derived"

    async def decide(self, request: ChatRequest, which: Which | None, options: Options) -> tuple[Choice, int]:
        """What would be decided, and the number of the turn; nothing is run but what the router needs.

        Raises:
            UserError: nothing can be.
        """
        told = read_conversation(request.messages, options.task, needs_task=isinstance(self.backend, InProcess))
        decider = await self.decider(which)
        name, _ = self.name_of(request, options, told)
        held = self.table.find(name) or Held()
        async with held.lock:
            session = held.session
            if session is None or not goes_on(session, told):
                session = self._opened(name, told, decider, options)
            aside = replace(session, decider=decider, budget=budget_of(options), held=None)
            most = request.max_completion_tokens or request.max_tokens
            ask = Ask(aside, told.observation, options.admissible_commands, request.temperature, most)
            choice = await self.backend.decide(ask)
        return choice, len(told.past) + 1

    async def end(self, name: str, outcome: Outcome) -> dict[str, Any]:
        """The session has ended, and its episode is on the disk.

        Raises:
            NotFound: there is no such session.
            UserError: there is no such type of task as the outcome or the session names; it can be posted again.
            OSError: it cannot be written; the outcome can be posted again.
        """
        if name in self._ended:
            return self._ended[name]
        held = self.table.find(name)
        if held is None or held.session is None:
            raise NotFound("there is no such session: it has ended long ago, or was never begun here")
        async with held.lock:
            if name in self._ended:
                return self._ended[name]
            session = held.session
            said = {"session_id": name, "steps": session.turn, "cost": round(session.cost, 6)}
            said["spend"] = round(session.spend / max(session.turn, 1), 6)
            if not session.has_foreign_steps:
                self._refuse_unknown(
                    outcome.task_type or session.task.task_type, "post the outcome again with one of these"
                )
            _rename(session, outcome)
            try:
                episode = episode_of(session, outcome.success, outcome.reward, outcome.observation)
                path = await asyncio.to_thread(self.journal.write, episode)
                said |= {"logged": True, "episode_id": episode.episode_id, "file": path.name}
            except ValidationError as error:
                said |= {"logged": False, "why": self._refused(_not_logged(error))}
            except UserError as error:
                said |= {"logged": False, "why": self._refused(str(error))}
            except OSError:
                self.metrics.count("dmr_log_errors_total")
                raise
            self.table.drop(name)
        self._ended[name] = said
        while len(self._ended) > _ENDED:
            self._ended.popitem(last=False)
        self.metrics.count("dmr_episodes_total", outcome="success" if outcome.success else "failure")
        await self.backend.close(session)
        return said

    async def stop(self) -> None:
        """Sessions that go on are kept for the next server: at once, but for those that act; these after their step, or without
        it where it takes longer than is left."""
        acting = [held for held in self.table if held.lock.locked()]
        self._keep_all(held for held in self.table if not held.lock.locked())
        if self._running:
            await asyncio.wait(self._running, timeout=STEP_SECONDS)
        self._keep_all(acting)
        await asyncio.to_thread(self.backend.stop)

    def _keep_all(self, several: Iterable[Held]) -> None:
        for held in several:
            if held.session is not None and held.session.actions:
                self._keep(held.session)

    def start(self) -> None:
        """What earlier servers have kept too long is ended."""
        for session in self.unended.take_old(self.settings.session_seconds):
            self._ended_without_outcome(session)

    def gauges(self) -> dict[str, tuple[str, float]]:
        return {"dmr_sessions": ("Sessions that are kept.", len(self.table))}

    async def _turn(
        self,
        request: ChatRequest,
        told: Conversation,
        decider: Decider,
        options: Options,
        name: str,
        stream: Stream | None,
    ) -> tuple[str, Action]:
        most = request.max_completion_tokens or request.max_tokens
        async with self.table.turn(name) as held:
            session = held.session
            asked = Asked(request.model, request.temperature, most, tuple(request.stops))
            if session is not None and session.actions and session.asked == asked and is_repeated(session, told):
                return session.answers[-1], session.actions[-1]
            session = await self.going_on(held, name, told, decider, options)
            hear = None if stream is None else stream.hear
            ask = Ask(session, told.observation, options.admissible_commands, request.temperature, most, hear)
            assert isinstance(self.backend, InProcess)
            action = await self.backend.act(ask)
            session.asked = asked
            pieces = None if stream is None else stream.pieces
            session.answers[-1] = (
                cut(action.command, request.stops) if pieces is None else pieces.answer(action.command)
            )
            self.count(action)
            return session.answers[-1], action

    async def going_on(self, held: Held, name: str, told: Conversation, decider: Decider, options: Options) -> Session:
        """The session, at the turn of this conversation: another one where the conversation is not its own."""
        session = held.session
        if session is not None and not goes_on(session, told):
            held.session = None
            self._ended_without_outcome(session)
            session = None
        if session is None:
            session = held.session = self._opened(name, told, decider, options)
            self._ended.pop(name, None)
        session.decider, session.budget = decider, budget_of(options)
        return session

    def _opened(self, name: str, told: Conversation, decider: Decider, options: Options) -> Session:
        if options.task_type is not None:
            self._refuse_unknown(options.task_type, "name one of these, or none")
        goal = Goal(options.task_id or name, options.task_type or "unknown", told.task)
        return self.backend.open(name, RolloutRequest(goal), decider, budget_of(options), told.past)

    def _refuse_unknown(self, task_type: str, remedy: str) -> None:
        known = self.journal.rules.task_types
        if task_type not in known:
            raise UserError(f"task_type: {task_type!r} is none of {', '.join(known)}; {remedy}")

    def _refused(self, why: str) -> str:
        """Why an episode is not logged, once that is told here too."""
        self.metrics.count("dmr_episodes_refused_total")
        log.warning("%s", printable(why))
        return why

    def _ended_without_outcome(self, session: Session) -> None:
        self.metrics.count("dmr_episodes_total", outcome="unknown")
        self.backend.forget(session)
        self._set_aside(session)

    def _keep(self, session: Session) -> None:
        try:
            self.unended.keep(session)
        except OSError as error:
            self.metrics.count("dmr_log_errors_total")
            log.warning("a session that goes on is lost: %s", error.strerror)

    def _set_aside(self, session: Session) -> None:
        if session.actions and not session.has_foreign_steps:
            try:
                self.journal.set_aside(episode_of(session, False))
            except ValidationError as error:
                self._refused(_not_logged(error))
            except OSError as error:
                self.metrics.count("dmr_log_errors_total")
                log.warning("an episode without an outcome is lost: %s", error.strerror)

    def count(self, action: Action) -> None:
        metrics = self.metrics
        metrics.count("dmr_tokens_total", action.prompt_tokens, kind="prompt")
        metrics.count("dmr_tokens_total", action.cached_tokens, kind="cached")
        metrics.count("dmr_tokens_total", action.completion_tokens, kind="completion")
        metrics.count("dmr_switches_total", int(action.switched))
        metrics.count("dmr_cost_total", action.cost)
        metrics.count("dmr_cost_saved_total", max(0.0, action.cost_at_dearest - action.cost))
        if action.probability is not None:
            metrics.observe("dmr_probability", action.probability)


def _not_logged(error: ValidationError) -> str:
    return f"the episode is not logged: {'; '.join(problems_of(error))}"


def _rename(session: Session, outcome: Outcome) -> None:
    """The task as the outcome names it, where it does."""
    task, run = session.task, session.trajectory.run
    goal = Goal(outcome.task_id or task.task_id, outcome.task_type or task.task_type, task.instruction)
    session.trajectory.run = RolloutRequest(goal, run.member)
