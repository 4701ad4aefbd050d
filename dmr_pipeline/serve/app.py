"""The server's HTTP interface: OpenAI's chat completions, and what is ours beside it."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from math import ceil, isfinite
from typing import Any, NoReturn
from urllib.parse import urlsplit
from uuid import uuid4

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dmr_pipeline.errors import UserError, printable, problems_of
from dmr_pipeline.serve.proxy import Proxy
from dmr_pipeline.serve.requests import ChatRequest, Options, Outcome, Which, options_of, which_of
from dmr_pipeline.serve.service import Answer, NotFound, Service, Streamed
from dmr_pipeline.serve.sessions import Action, Choice
from dmr_pipeline.serve.settings import LOOPBACK, ServeSettings
from dmr_pipeline.serve.streaming import sse_event
from dmr_pipeline.serve.text_router import TextRouter
from dmr_pipeline.serve.upstreams import Down, Refused, Upstreams

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """An ASGI application. The service stops with it."""
    settings, http = service.settings, _Http(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()
        await http.close()

    routes = [
        Route("/v1/chat/completions", http.guarded(http.chat), methods=["POST"]),
        Route("/v1/decision", http.guarded(http.decision), methods=["POST"]),
        Route("/v1/sessions/{session_id:path}/outcome", http.guarded(http.outcome), methods=["POST"]),
        Route("/v1/models", http.guarded(http.models)),
        Route("/metrics", http.guarded(http.metrics)),
        Route("/health", http.health),
    ]
    middleware = []
    if settings.api_key is None:
        # A page on the internet whose name is made to lead to 127.0.0.1 would reach the server from its reader's browser.
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"], www_redirect=False))
        middleware.append(Middleware(_OwnPagesOnly))
    handlers = {HTTPException: _http_error, Exception: _unforeseen}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)  # type: ignore[arg-type]


def refuse_open_door(settings: ServeSettings) -> None:
    """
    Raises:
        UserError: others could reach the server, and nothing is asked of them.
    """
    if settings.host not in LOOPBACK and (settings.api_key is None or not settings.api_key.get_secret_value()):
        raise UserError(
            f"--host {settings.host}: whoever reaches this address could use the server: set DMR_API_KEY to a secret that clients"
            " are to send (Authorization: Bearer ...), or leave --host out"
        )


class _OwnPagesOnly:
    """Refuses what a browser sends for a page of another host. It lets any page post plain text to 127.0.0.1, which would begin
    sessions and write episodes to be trained on; their page of origin is the one thing that tells these requests apart."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None or _host_of(origin) in LOOPBACK:
            return await self.app(scope, receive, send)
        said = (
            f"Origin: {printable(origin)} is a page of another host: set DMR_API_KEY for the server and send it"
            " (Authorization: Bearer ...), or call without a browser"
        )
        return await _error(403, said, "forbidden_origin")(scope, receive, send)


class _Stalled(Exception):
    """A request's body does not come."""


class _Http:
    def __init__(self, service: Service) -> None:
        self.service, self.settings = service, service.settings
        self.running = 0
        self.upstreams: Upstreams | None = None
        if isinstance(service.backend, TextRouter):
            self.upstreams = Upstreams(self.settings, service.backend.route, service.metrics)
            self.proxy = Proxy(service, self.upstreams)

    async def close(self) -> None:
        if self.upstreams is not None:
            await self.upstreams.close()

    def guarded(self, handler: Handler) -> Handler:
        """The handler for those who may ask, and as many at once as the server can bear; trouble is told as OpenAI tells it."""

        async def checked(request: Request) -> Response:
            if not self._may_ask(request):
                return _error(401, "a key is needed: Authorization: Bearer ...", "invalid_api_key")
            if self.running >= self.settings.requests:
                return _error(429, "too many requests at once", "rate_limit_exceeded", {"retry-after": "1"})
            self.running += 1
            response: Response | None = None
            try:
                response = await handler(request)
                return response
            except Refused as error:
                return Response(error.content, error.status, media_type="application/json")
            except Down as error:
                return _error(503, str(error), "upstream_down", {"retry-after": str(ceil(error.wait or 1))})
            except NotFound as error:
                return _error(404, str(error), "not_found")
            except UserError as error:
                return _error(400, str(error), "invalid_request_error")
            except ValidationError as error:
                return _error(400, "; ".join(problems_of(error)), "invalid_request_error")
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except _Stalled:
                waited = f"the request's body has not come within {self.settings.request_seconds:g} s: send it again"
                return _error(408, waited, "timeout")
            except TimeoutError:
                return _error(504, f"no answer within {self.settings.request_seconds:g} s: ask again", "timeout")
            finally:
                if isinstance(response, _Closing):
                    response.stack.callback(self._ended)  # its answer is yet to be written
                else:
                    self._ended()

        return checked

    def _ended(self) -> None:
        self.running -= 1

    async def chat(self, request: Request) -> Response:
        started, body = time.perf_counter(), await self._body(request)
        asked = ChatRequest.model_validate_json(body)
        which, options = which_of(asked.model, self.settings.recipe), options_of(asked, request.headers)
        if self.upstreams is not None:
            return await self._pass_on(request, asked, _content_of(body), which, options)
        try:
            if asked.stream:
                streamed = await self.service.stream(asked, which, options)
            else:
                answer = await self.service.chat(asked, which, options)
        except Exception:
            self.service.metrics.count("dmr_requests_total", precision="none", reason="none", outcome="error")
            raise
        found = streamed if asked.stream else answer
        self._measure(found.action, started)
        headers = headers_of(found.action) | {"x-session-id": found.session_id, "x-dmr-session-source": found.source}
        if not asked.stream:
            self._measure_tokens(answer.action, started)
            return JSONResponse(_Shown(self.settings.recipe, answer.action.precision).whole(answer), headers=headers)
        stack = AsyncExitStack()
        stack.callback(streamed.leave)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return _Closing(
            stack, self._events(streamed, with_usage, started), media_type="text/event-stream", headers=headers
        )

    async def _events(self, streamed: Streamed, with_usage: bool, started: float) -> AsyncIterator[str]:
        """Server-sent events. Where it cannot go on an error is the last one."""
        shown = _Shown(self.settings.recipe, streamed.action.precision)
        common = {**shown.common, "object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})

        def chunk(delta: dict[str, str], finish: str | None = None) -> str:
            return sse_event({**common, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        yield chunk({"role": "assistant", "content": ""})
        if streamed.action.thought:
            yield chunk({"reasoning_content": streamed.action.thought})
        try:
            async for piece in streamed.pieces():
                yield chunk({"content": piece})
            answer = streamed.turn.result()
        except Exception as error:  # noqa: BLE001 - the answer has begun: this is the only way left to tell of it
            kind = "timeout" if isinstance(error, TimeoutError) else "internal_error"
            log.warning("a streamed answer broke off: %s", type(error).__name__)
            said = "the answer broke off; ask again, and the turn is answered anew"
            yield sse_event({"error": {"message": said, "type": kind, "param": None, "code": kind}})
            return
        self._measure_tokens(answer.action, started)
        yield chunk({}, shown.finish(answer))
        if with_usage:
            yield sse_event({**common, "choices": [], "usage": shown.usage(answer.action)})
        yield "data: [DONE]\n\n"

    def _measure(self, action: Action, started: float) -> None:
        """An answer that has begun."""
        metrics = self.service.metrics
        metrics.count("dmr_requests_total", precision=action.precision, reason=action.reason, outcome="ok")
        metrics.observe("dmr_first_token_seconds", time.perf_counter() - started)

    def _measure_tokens(self, action: Action, started: float) -> None:
        """One that has ended."""
        spent = time.perf_counter() - started
        self.service.metrics.observe("dmr_token_seconds", spent / max(1, action.completion_tokens))

    async def _pass_on(
        self, request: Request, asked: ChatRequest, body: dict[str, Any], which: Which | None, options: Options
    ) -> Response:
        started, metrics = time.perf_counter(), self.service.metrics
        call = asyncio.create_task(self.proxy.chat(asked, body, which, options))
        gone = asyncio.create_task(_gone(request))
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                await asyncio.wait({call, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                metrics.count("dmr_requests_total", precision="none", reason="none", outcome="gone")
                return Response(status_code=499)  # nobody reads it
            proxied = call.result()
        except Exception:
            metrics.count("dmr_requests_total", precision="none", reason="none", outcome="error")
            raise
        finally:
            gone.cancel()
            if not call.done():
                call.cancel()
                await asyncio.wait({call})
        action = proxied.action
        self._measure(action, started)
        headers = headers_of(action) | {"x-session-id": proxied.session_id, "x-dmr-session-source": proxied.source}
        if proxied.degraded:
            headers["x-dmr-degraded"] = "true"
        if proxied.events is None:
            return JSONResponse(proxied.whole, headers=headers)
        return _Closing(proxied.stack, proxied.events, media_type="text/event-stream", headers=headers)

    async def decision(self, request: Request) -> Response:
        asked = ChatRequest.model_validate_json(await self._body(request))
        which, options = which_of(asked.model, self.settings.recipe), options_of(asked, request.headers)
        choice, turn = await self.service.decide(asked, which, options)
        return JSONResponse({"object": "dmr.decision", "turn": turn, **_told(choice)})

    async def outcome(self, request: Request) -> Response:
        outcome = Outcome.model_validate_json(await self._body(request))
        try:
            return JSONResponse(await self.service.end(request.path_params["session_id"], outcome))
        except OSError as error:
            why = error.strerror or type(error).__name__
            log.warning("an episode cannot be written: %s", why)
            return _error(507, f"the episode cannot be written ({why}): mend it, and post the outcome again", "storage")

    async def models(self, _: Request) -> Response:
        names = self.service.backend.deciders.names()
        return JSONResponse(
            {
                "object": "list",
                "data": [{"id": name, "object": "model", "created": 0, "owned_by": "dmr"} for name in names],
            }
        )

    async def metrics(self, _: Request) -> Response:
        self.service.table.sweep()
        return PlainTextResponse(
            self.service.metrics.text(self.service.gauges()), media_type="text/plain; version=0.0.4"
        )

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _body(self, request: Request) -> bytes:
        """
        Raises:
            UserError: it is too large.
            _Stalled: it does not come in time.
            ClientDisconnect: its client has left.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self.settings.request_bytes:
                        raise UserError(f"the request has more than {self.settings.request_bytes:,} bytes")
        except TimeoutError as error:
            raise _Stalled from error
        return bytes(body)

    def _may_ask(self, request: Request) -> bool:
        if self.settings.api_key is None:
            return True
        said = request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(said.encode(), self.settings.api_key.get_secret_value().encode())


class _Closing(StreamingResponse):
    """Whatever becomes of it, what it stands on is closed after it."""

    def __init__(self, stack: AsyncExitStack, content: AsyncIterator[str], **rest: Any) -> None:  # noqa: ANN401 - as above
        super().__init__(content, **rest)
        self.stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.stack.aclose()


def _content_of(body: bytes) -> dict[str, Any]:
    """What an upstream is to get.

    Raises:
        UserError: it holds a number that no JSON can, and no upstream would be sent.
    """

    def refuse(number: str) -> NoReturn:
        raise UserError(f"the request holds the number {number[:20]}, which JSON cannot: leave it out")

    def finite(number: str) -> float:
        return value if isfinite(value := float(number)) else refuse(number)

    content: dict[str, Any] = json.loads(body, parse_constant=refuse, parse_float=finite)
    return content


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).hostname
    except ValueError:
        return None


async def _gone(request: Request) -> None:
    """Returns once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def headers_of(action: Action) -> dict[str, str]:
    """How the action came about; what is not known is left out."""
    said = {
        "precision": action.precision,
        "probability": None if action.probability is None else f"{action.probability:.6f}",
        "threshold": None if action.threshold is None else f"{action.threshold:.6f}",
        "release": action.release,
        "turn": action.turn,
        "switched": str(action.switched).lower(),
        "reason": action.reason,
        "cost-left": None if action.cost_left is None else f"{action.cost_left:.6f}",
    }
    return {f"x-dmr-{name}": str(value) for name, value in said.items() if value is not None}


class _Shown:
    """An answer in OpenAI's words."""

    def __init__(self, recipe: str, precision: str) -> None:
        self.common = {
            "id": f"chatcmpl-{uuid4().hex}",
            "created": int(time.time()),
            "model": f"dmr/{recipe}:{precision}",
        }

    def finish(self, answer: Answer) -> str:
        return "stop" if answer.stopped else "length"

    def usage(self, action: Action) -> dict[str, Any]:
        return {
            "prompt_tokens": action.prompt_tokens,
            "completion_tokens": action.completion_tokens,
            "total_tokens": action.prompt_tokens + action.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": action.cached_tokens},
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        thought = answer.action.thought
        message = {"role": "assistant", "content": answer.text} | ({"reasoning_content": thought} if thought else {})
        choice = {"index": 0, "message": message, "finish_reason": self.finish(answer), "logprobs": None}
        return {**self.common, "object": "chat.completion", "choices": [choice], "usage": self.usage(answer.action)}


def _told(choice: Choice) -> dict[str, Any]:
    decision = choice.decision
    return {
        "precision": decision.precision,
        "probability": decision.exceedance[0] if decision.exceedance else None,
        "threshold": choice.threshold,
        "release": choice.release,
        "reason": choice.reason,
        "propensity": choice.propensity,
    }


def _error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    content = {"error": {"message": message, "type": kind, "param": None, "code": kind}}
    return JSONResponse(content, status_code=status, headers=headers)


async def _http_error(_: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail, "http_error")


async def _unforeseen(_: Request, error: Exception) -> Response:
    return _error(500, f"{type(error).__name__}: this was not foreseen", "internal_error")
