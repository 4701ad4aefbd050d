"""OpenAI-compatible servers of one model at several precisions, and what is done when they fail.

Tries are repeated as long as nothing of an answer has been passed on, but not after one that took too long. A precision that
stays down is replaced by the next dearer one that answers; where none does, by a cheaper one if that is allowed, and the answer
says so.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from math import isfinite
from typing import Any

import httpx2 as httpx

from dmr_pipeline.errors import UserError
from dmr_pipeline.serve.metrics import Metrics
from dmr_pipeline.serve.settings import ServeSettings

log = logging.getLogger(__name__)

_NOT_THE_CLIENTS = frozenset({401, 403, 404, 408, 429})
"""Statuses below 500 that say nothing against the request itself: its client has no part in the key, the address and the model's
name there, nor in the load."""
_SAMPLES = (
    "You are in a room. Looking around, you see a mug 2.",
    " <think>\n\n\tput\u00a0it (7.99) there</think>",
    "{{ 0 }} ünïcödé 你好",
)
_TURNS = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), _SAMPLES, strict=True)]
_QUESTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    *(
        (
            "tokenizers",
            "/tokenize",
            {"prompt": text, "content": text, "add_special_tokens": False, "add_special": False},
            "tokens",
        )
        for text in _SAMPLES
    ),
    ("chat templates", "/tokenize", {"messages": _TURNS}, "tokens"),  # vLLM
    ("chat templates", "/apply-template", {"messages": _TURNS}, "prompt"),  # llama.cpp
)
"""What precisions of one model answer alike: what it tells of, path, request, and key of the answer. Servers know `prompt` and
`add_special_tokens` (vLLM, SGLang), or `content` and `add_special` (llama.cpp); by default they do not begin a text alike."""


class Refused(Exception):
    """An upstream refuses the request itself; its answer is the client's."""

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(f"status {status}")
        self.status, self.content = status, content


class Down(Exception):
    """No upstream answers."""

    def __init__(self, message: str, wait: float | None) -> None:
        super().__init__(message)
        self.wait = wait
        """Seconds until one of them may, where they say so."""


class Failed(Exception):
    """One try has failed."""

    def __init__(self, kind: str, wait: float | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        """status_500, timeout, connection, bad_answer and so on."""
        self.wait = wait
        """Seconds that the upstream asks for."""


@dataclass
class Opened:
    """An answer that has begun."""

    precision: str
    whole: dict[str, Any] | None
    """Where it is not streamed."""
    events: AsyncIterator[dict[str, Any]] | None
    """Chunks of one that is streamed, the first included. Raises Failed where it breaks off."""


class Upstreams:
    def __init__(self, settings: ServeSettings, route: Sequence[str], metrics: Metrics) -> None:
        self.settings, self.route, self._metrics = settings, tuple(route), metrics
        read = settings.first_byte_seconds
        timeout = httpx.Timeout(read, connect=settings.connect_seconds, read=read)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        key = settings.upstream_key
        headers = {} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"}
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, headers=headers)
        self._names = dict(settings.upstream_models)

    async def close(self) -> None:
        await self._client.aclose()

    async def check(self) -> list[str]:
        """What differs between the upstreams, as far as they tell: a router reads one tokenizer's tokens, and precisions are of
        one model."""
        problems = list[str]()
        for what, path, question, key in _QUESTIONS:
            answers = await asyncio.gather(*(self._answer(rung, path, question, key) for rung in self.route))
            told = {rung: answer for rung, answer in zip(self.route, answers, strict=True) if answer}
            first = next(iter(told), None)
            problems += [
                f"{rung} and {first} have different {what}: they are no precisions of one model"
                for rung, answer in told.items()
                if first is not None and answer != told[first]
            ]
        return list(dict.fromkeys(problems))

    async def open(self, stack: AsyncExitStack, decided: str, body: Mapping[str, Any], stream: bool) -> Opened:
        """The answer of the precision that was decided on, or of another one where that is down.

        Args:
            stack: closes what was opened; the upstream's work is cancelled with it.

        Raises:
            Refused: the request itself is refused.
            Down: nobody answers.
        """
        place = self.route.index(decided)
        tried = [decided, *reversed(self.route[:place])]
        if self.settings.degrade:
            tried += self.route[place + 1 :]
        waits = list[float]()
        clock = asyncio.get_running_loop().time
        given_up = clock() + self.settings.request_seconds
        for i, precision in enumerate(tried):
            # An equal share of what is left, so that each of them is asked before the request is given up.
            until = clock() + (given_up - clock()) / (len(tried) - i)
            try:
                return await self._persistently(stack, precision, body, stream, until)
            except Failed as failure:
                log.warning("upstream %s is down (%s)", precision, failure.kind)
                waits += [] if failure.wait is None else [failure.wait]
        raise Down(f"no upstream answers ({', '.join(tried)})", min(waits, default=None))

    async def _persistently(
        self, stack: AsyncExitStack, precision: str, body: Mapping[str, Any], stream: bool, until: float
    ) -> Opened:
        """
        Args:
            until: when the event loop's clock says this it has failed.
        """
        patience = self.settings.request_seconds / 4
        for attempt in range(self.settings.retries + 1):
            try:
                return await self._in_time(stack, precision, body, stream, until)
            except Failed as failure:
                self._metrics.count("dmr_upstream_errors_total", precision=precision, kind=failure.kind)
                wait = self.settings.retry_seconds * 2**attempt if failure.wait is None else failure.wait
                left = until - asyncio.get_running_loop().time()
                if attempt == self.settings.retries or failure.kind == "timeout" or wait > min(patience, left):
                    raise
                await asyncio.sleep(wait)
        raise AssertionError

    async def _in_time(
        self, stack: AsyncExitStack, precision: str, body: Mapping[str, Any], stream: bool, until: float
    ) -> Opened:
        try:
            async with asyncio.timeout_at(until):
                return await self._once(stack, precision, body, stream)
        except TimeoutError as error:
            raise Failed("timeout") from error

    async def _once(self, stack: AsyncExitStack, precision: str, body: Mapping[str, Any], stream: bool) -> Opened:
        try:
            content = {**body, "model": await self._name(precision)}
            request = self._client.build_request("POST", self._url(precision, "/chat/completions"), json=content)
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise Failed(_kind(error)) from error
        closing = AsyncExitStack()
        closing.push_async_callback(response.aclose)
        try:
            if response.status_code != 200:
                return await self._not_200(precision, response)
            if not stream:
                return Opened(precision, _parsed(await response.aread()), None)
            events = _events(response)
            first = await anext(events, None)
            if first is None:
                raise Failed("bad_answer")
        except httpx.HTTPError as error:
            raise Failed(_kind(error)) from error
        finally:
            if not stream or response.status_code != 200:
                await closing.aclose()
            else:
                stack.push_async_callback(closing.aclose)
        return Opened(precision, None, _after(first, events))

    async def _not_200(self, precision: str, response: httpx.Response) -> Opened:
        content = await response.aread()
        if response.status_code == 404 and precision not in self.settings.upstream_models:
            self._names.pop(precision, None)  # another model may be there by now
        if response.status_code in _NOT_THE_CLIENTS or response.status_code >= 500:
            raise Failed(f"status_{response.status_code}", _seconds(response.headers.get("retry-after")))
        raise Refused(response.status_code, content)

    async def _name(self, precision: str) -> str:
        """Of the model there."""
        if precision not in self._names:
            response = await self._client.get(self._url(precision, "/models"))
            models = _parsed(response.content, "data").get("data") if response.status_code == 200 else None
            if not models or not isinstance(models, list):
                raise Failed("bad_answer")
            self._names[precision] = str(models[0]["id"])
        return self._names[precision]

    async def _answer(self, precision: str, path: str, question: Mapping[str, Any], key: str) -> object:
        """What the server says to this beside its /v1; None where it does not."""
        root = self.settings.upstreams[precision].rstrip("/").removesuffix("/v1")
        try:
            asked = {"model": await self._name(precision), **question}
            response = await self._client.post(f"{root}{path}", json=asked)
            return _parsed(response.content, key)[key] if response.status_code == 200 else None
        except (httpx.HTTPError, Failed):
            return None

    def _url(self, precision: str, path: str) -> str:
        return self.settings.upstreams[precision].rstrip("/") + path


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream of server-sent events, up to its end.

    Raises:
        Failed: it breaks off, or holds something else.
    """
    try:
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield _parsed(data.encode())
    except httpx.HTTPError as error:
        raise Failed(_kind(error)) from error
    raise Failed("broken_off")


async def _after(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    yield first
    async for event in rest:
        yield event


def _parsed(content: bytes, key: str = "choices") -> dict[str, Any]:
    """
    Raises:
        Failed: it is no JSON object with this key.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise Failed("bad_answer") from error
    if not isinstance(value, dict) or key not in value:
        raise Failed("bad_answer")
    return value


def _kind(error: httpx.HTTPError) -> str:
    return "timeout" if isinstance(error, httpx.TimeoutException) else "connection"


def _seconds(said: str | None) -> float | None:
    """Of a Retry-After header; dates are not looked at."""
    try:
        seconds = float(said or "nan")
    except ValueError:
        return None
    return max(0.0, seconds) if isfinite(seconds) else None


def refuse_differences(problems: Sequence[str]) -> None:
    """
    Raises:
        UserError: there are some.
    """
    if problems:
        raise UserError("; ".join(problems))
