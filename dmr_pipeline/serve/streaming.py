"""Answers that are shown while they are written.

No more is shown than what the command surely begins with: not a thought, nor what may be the beginning of a text that ends the
answer. A client that leaves ends the writing, and the step is not taken.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dmr_pipeline.rollout.prompts import Prompter, without_beginning_of
from dmr_pipeline.serve.sessions import Action, Choice, Session, begun


def sse_event(content: Mapping[str, Any]) -> str:
    """A server-sent event, as OpenAI's interface streams its chunks."""
    return f"data: {json.dumps(content)}\n\n"


@dataclass
class Pieces:
    """Of one answer."""

    prompter: Prompter
    stops: Sequence[str]
    shown: str = ""

    def after(self, tokens: Sequence[int]) -> str:
        """What more can be shown, once so much of the action is written."""
        text = without_beginning_of(cut(self.prompter.command_so_far(list(tokens)), self.stops), self.stops)
        if not text.startswith(self.shown):
            return ""
        more, self.shown = text[len(self.shown) :], text
        return more

    def answer(self, command: str) -> str:
        """The whole text, what was shown included. (Were that another beginning than the command's, which no tokenizer is known
        to bring about, it would be all that the client is told.)"""
        text = cut(command, self.stops)
        return text if text.startswith(self.shown) else self.shown


@dataclass
class Stream:
    """Between the thread that acts and a client that waits."""

    pieces: Pieces
    begun: Action | None = None
    """How the action came about, once a piece of it is there."""
    left: bool = False
    """Nobody waits for it."""
    _queue: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def hear(self, session: Session, choice: Choice, tokens: Sequence[int]) -> bool:
        """As `Ask.hear`."""
        if more := self.pieces.after(tokens):
            if self.begun is None:
                thought = self.pieces.prompter.thought_text(list(tokens))
                self.begun = replace(begun(session, choice), thought=thought)
            self._loop.call_soon_threadsafe(self._queue.put_nowait, more)
        return self.left

    def end(self) -> None:
        """Nothing more is heard."""
        self._queue.put_nowait(None)

    def leave(self) -> None:
        self.left = True

    async def heard(self) -> AsyncIterator[str]:
        """Pieces until the end."""
        while (piece := await self._queue.get()) is not None:
            yield piece


def cut(text: str, stops: Sequence[str]) -> str:
    """Up to the first of these texts that is in it."""
    return min((text.partition(stop)[0] for stop in stops if stop), key=len, default=text)
