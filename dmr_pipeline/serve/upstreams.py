"""OpenAI-compatible servers of one model at several precisions, and what is done when they fail.

Tries are repeated as long as nothing of an answer has been passed on. A precision that stays down is replaced by the next dearer
one that answers; where none does, by a cheaper one if that is allowed, and the answer says so.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from dmr_pipeline.errors import UserError
from dmr_pipeline.serve.metrics import Metrics
from dmr_pipeline.serve.settings import ServeSettings

log = logging.getLogger(__name__)

_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
"""What another try may mend."""
_SAMPLES = (
    "You are in a room. Looking around, you see a mug 2.",
    " <think>\n\n\tput\u00a0it (7.99) there</think>",
    "{{ 0 }} ünïcödé 你好",
)


class Refused(Exception):
    """An upstream refuses the request itself; its answer is the client's."""

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(f"status {status}")
        self.status, self.content = status, content


class Down(Exception):
    """No upstream answers."""


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
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits)
        self._names = dict(settings.upstream_models)

    async def close(self) -> None:
        await self._client.aclose()

    async def check(self) -> list[str]:
        """What differs between the upstreams, as far as they tell: a router reads one tokenizer's tokens, and precisions are of
        one model. Those that cannot be asked are not compared."""
        found: dict[str, list[object]] = {rung: [await self._tokens(rung, s) for s in _SAMPLES] for rung in self.route}
        told = {rung: tokens for rung, tokens in found.items() if None not in tokens}
        first = next(iter(told), None)
        return [
            f"{rung} and {first} have different tokenizers or chat templates: they are no precisions of one model"
            for rung, tokens in told.items()
            if first is not None and tokens != told[first]
        ]

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
        for precision in tried:
            try:
                return await self._persistently(stack, precision, body, stream)
            except Failed as failure:
                log.warning("upstream %s is down (%s)", precision, failure.kind)
        raise Down(f"no upstream answers ({', '.join(tried)})")

    async def _persistently(
        self, stack: AsyncExitStack, precision: str, body: Mapping[str, Any], stream: bool
    ) -> Opened:
        for attempt in range(self.settings.retries + 1):
            try:
                return await self._once(stack, precision, body, stream)
            except Failed as failure:
                self._metrics.count("dmr_upstream_errors_total", precision=precision, kind=failure.kind)
                if attempt == self.settings.retries:
                    raise
                wait = self.settings.retry_seconds * 2**attempt if failure.wait is None else failure.wait
                await asyncio.sleep(min(wait, self.settings.request_seconds / 4))
        raise AssertionError

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
                return await self._not_200(response)
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

    async def _not_200(self, response: httpx.Response) -> Opened:
        content = await response.aread()
        if response.status_code in _AGAIN or response.status_code >= 500:
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

    async def _tokens(self, precision: str, text: str) -> object:
        """Ids of a text, and of it as a message; None where this upstream does not tell. vLLM, SGLang and llama.cpp do."""
        root = self.settings.upstreams[precision].rstrip("/").removesuffix("/v1")
        try:
            name = await self._name(precision)
            response = await self._client.post(
                f"{root}/tokenize", json={"model": name, "prompt": text, "content": text}
            )
            return _parsed(response.content, "tokens").get("tokens") if response.status_code == 200 else None
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
        return None if said is None else max(0.0, float(said))
    except ValueError:
        return None


def refuse_differences(problems: Sequence[str]) -> None:
    """
    Raises:
        UserError: there are some.
    """
    if problems:
        raise UserError("; ".join(problems))
