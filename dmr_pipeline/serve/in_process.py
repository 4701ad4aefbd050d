"""The ladder in this process, behind a server: one thread acts, on all sessions that wait, together."""

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.ladder import deployed, read_ladder
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.kv_cache.choice import rows_that_fit
from dmr_pipeline.rollout.parallel import cores
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import rungs_of
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.rules import is_rule_at_bar
from dmr_pipeline.serve import release
from dmr_pipeline.serve.deciders import Deciders
from dmr_pipeline.serve.local import Ask, LocalAgents, Turn
from dmr_pipeline.serve.metrics import Metrics
from dmr_pipeline.serve.sessions import Action, Budget, Choice, Decider, Session
from dmr_pipeline.serve.settings import ServeSettings

T = TypeVar("T")


class InProcess:
    """
    Raises:
        UserError: the ladder is not made, or a limit leaves no room for it.
    """

    def __init__(self, settings: ServeSettings, recipe: Recipe, metrics: Metrics) -> None:
        checkpoints = verify(artifact_folder("quantized_checkpoints", settings.recipe, settings.data_root)).path
        static = settings.static
        if static == "verdict":
            static = "<".join(deployed(read_ladder(checkpoints).verdict))
        rungs = None if static is None or is_rule_at_bar(static) else rungs_of(static)
        self.rollouts = Rollouts.load(checkpoints, recipe, rungs)
        self.route = self.rollouts.route
        rollouts = self.rollouts
        models = list(rollouts.acting.models.values())
        # One more is for what is decided and not played.
        rows = rows_that_fit(
            models, rollouts.capacity, settings.slots + 1, 1, rollouts.shared_cache, "--slots and one more"
        )
        slots = max(1, rows - 1)
        fallback = self.route[-1] if settings.low_on_failure else self.route[0]
        self.agents = LocalAgents(self.rollouts, slots, settings.seed, settings.epsilon, fallback)
        self.deciders = Deciders(
            settings.recipe,
            settings.data_root,
            self.route,
            lambda folder: release.load(folder, self.rollouts),
            slots,
            self.rollouts.can_draft,
            None if static is None else (static, self.agents.untrained(static)),
            settings.router,
        )
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, "acting", leave_a_core)
        self._waiting: list[tuple[Ask, asyncio.Future[Action]]] = []
        self._lock = threading.Lock()

    def open(self, name: str, run: RolloutRequest, decider: Decider, budget: Budget, past: Sequence[Turn]) -> Session:
        return self.agents.open(name, run, decider, budget, past)

    async def act(self, ask: Ask) -> Action:
        """
        Raises:
            UserError: why the session has no next action.
        """
        future: asyncio.Future[Action] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.append((ask, future))
        self._thread.submit(self._act_on_all)
        return await future

    async def decide(self, ask: Ask) -> Choice:
        return await self._in_thread(lambda: self.agents.decide(ask))

    async def close(self, session: Session) -> None:
        await self._in_thread(lambda: self.agents.close(session))

    def forget(self, session: Session) -> None:
        """As `close`, some time soon."""
        self._thread.submit(self.agents.close, session)

    def stop(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(work))

    def _act_on_all(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        failures = self.agents.deciding.failures
        try:
            found: Sequence[Action | BaseException] = self.agents.act([ask for ask, _ in waiting])
        except Exception as error:  # noqa: BLE001 - whoever waits is told, and the thread goes on
            found = [error] * len(waiting)
        spent = self.agents.clock
        loop = waiting[0][1].get_loop()
        loop.call_soon_threadsafe(self._tell, waiting, found, spent.router, self.agents.deciding.failures - failures)

    def _tell(
        self,
        waiting: Sequence[tuple[Ask, asyncio.Future[Action]]],
        found: Sequence[Action | BaseException],
        router_seconds: float,
        failures: int,
    ) -> None:
        self._metrics.observe("dmr_router_seconds", router_seconds)
        if failures:
            self._metrics.count("dmr_fail_open_total", failures)
        for (_, future), outcome in zip(waiting, found, strict=True):
            if future.done():
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


def leave_a_core() -> None:
    """For who answers, unless OMP_NUM_THREADS says how many threads torch has: while these wait for each other they keep their
    cores, and what answers clients waits for a core in turn. Of the thread that calls it: MKL has a number for each."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() - 1))


def refuse_other_wishes(tools: bool, n: int) -> None:
    """
    Raises:
        UserError: an agent that acts here cannot do so.
    """
    if tools:
        raise UserError("tools: this recipe's agents write commands; tools are for agents behind an upstream")
    if n > 1:
        raise UserError("n: an episode goes on with one action; ask once for each")
