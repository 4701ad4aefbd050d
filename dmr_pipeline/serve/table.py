"""Sessions by their names, as many and as long as the settings allow."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from dmr_pipeline.serve.conversation import Conversation
from dmr_pipeline.serve.sessions import Session


@dataclass
class Held:
    """A session and who waits for it."""

    session: Session | None = None
    """None before its first turn."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of its turns, one after the other."""
    heard: float = field(default_factory=time.monotonic)


class Table:
    """
    Args:
        most: sessions.
        seconds: after which one that is not heard of has ended.
        on_end: called with each session that goes for want of room or of a sign of life.
        take_over: the session of a name that an earlier server has left here, if there is one.
    """

    def __init__(
        self,
        most: int,
        seconds: float,
        on_end: Callable[[Session], None],
        take_over: Callable[[str], Session | None] = lambda _: None,
    ) -> None:
        self.most, self.seconds, self._on_end, self._take_over = most, seconds, on_end, take_over
        self._held: OrderedDict[str, Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def find(self, name: str) -> Held | None:
        if name not in self._held and (session := self._take_over(name)) is not None:
            self.hold(name).session = session
        return self._held.get(name)

    def hold(self, name: str) -> Held:
        """The session of this name, or room for it."""
        self.sweep()
        if name not in self._held:
            self._held[name] = Held(self._take_over(name))
        held = self._held[name]
        held.heard = time.monotonic()
        self._held.move_to_end(name)
        while len(self._held) > self.most:
            oldest = next((n for n, h in self._held.items() if not h.lock.locked() and n != name), None)
            if oldest is None:
                break
            self._end(oldest)
        return held

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[Held]:
        """The session of this name, or room for it, to oneself. Where it ends while it is waited for, it is another one."""
        while True:
            held = self.hold(name)
            async with held.lock:
                if self._held.get(name) is held:
                    yield held
                    return

    def drop(self, name: str) -> None:
        self._held.pop(name, None)

    def sweep(self) -> None:
        """What has not been heard of for too long goes."""
        now = time.monotonic()
        for name, held in list(self._held.items()):
            if now - held.heard <= self.seconds:
                break  # they lie in the order in which they were heard of
            if not held.lock.locked():
                self._end(name)

    def _end(self, name: str) -> None:
        held = self._held.pop(name)
        if held.session is not None:
            self._on_end(held.session)


def goes_on(session: Session, told: Conversation) -> bool:
    """Whether a conversation is this session's, with one observation more."""
    return len(told.past) == session.turn and _agrees(session, told)


def is_repeated(session: Session, told: Conversation) -> bool:
    """Whether a conversation is the one that the session's last action was the answer to."""
    return len(told.past) == session.turn - 1 and _agrees(session, told) and told.observation == _shown(session)[-1]


def _agrees(session: Session, told: Conversation) -> bool:
    shown = _shown(session)
    return told.task == session.task.instruction and all(
        turn.observation == shown[i] and turn.command == session.answers[i] for i, turn in enumerate(told.past)
    )


def _shown(session: Session) -> list[str]:
    """What each step was an answer to."""
    steps = session.trajectory.steps
    return [session.trajectory.opening, *(step.observation for step in steps[:-1])][: len(steps)]
