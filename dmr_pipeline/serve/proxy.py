"""Chat requests that upstreams answer: decided here, once, before the first byte; passed on as they come."""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from dmr_pipeline.serve.conversation import command_of, read_conversation
from dmr_pipeline.serve.local import Ask
from dmr_pipeline.serve.requests import ChatRequest, Options, Which
from dmr_pipeline.serve.service import Service
from dmr_pipeline.serve.sessions import Action, Choice, begun
from dmr_pipeline.serve.streaming import sse_event
from dmr_pipeline.serve.table import is_repeated
from dmr_pipeline.serve.text_router import TextRouter
from dmr_pipeline.serve.upstreams import Failed, Opened, Upstreams


@dataclass(frozen=True)
class Proxied:
    """An answer, or its beginning."""

    action: Action
    """As far as it is known before the first byte."""
    session_id: str
    source: str
    degraded: bool
    """A cheaper precision answers than was decided on."""
    whole: dict[str, Any] | None
    events: AsyncIterator[str] | None
    """Of one that is streamed."""
    stack: AsyncExitStack
    """To be closed once the answer has been sent, or nobody waits for it: the upstream's work ends with it."""


class Proxy:
    def __init__(self, service: Service, upstreams: Upstreams) -> None:
        assert isinstance(service.backend, TextRouter)
        self._service, self._router, self._upstreams = service, service.backend, upstreams

    async def chat(self, request: ChatRequest, body: dict[str, Any], which: Which | None, options: Options) -> Proxied:
        """
        Args:
            body: the request as it came.

        Raises:
            UserError: it cannot be decided.
            Refused: the upstream refuses the request.
            Down: no upstream answers.
        """
        service, asked_at = self._service, time.perf_counter()
        told = read_conversation(request.messages, options.task, needs_task=False)
        decider = await service.decider(which)
        name, source = service.name_of(request, options, told)
        stack = AsyncExitStack()
        try:
            held = await stack.enter_async_context(service.table.turn(name))
            if held.session is not None and held.session.actions and is_repeated(held.session, told):
                self._router.undo(held.session)  # its answer has not come through
            session = await service.going_on(held, name, told, decider, options)
            ask = Ask(session, told.observation, options.admissible_commands)
            started = time.perf_counter()
            choice, failed = await self._router.choose(ask)
            service.metrics.observe("dmr_router_seconds", time.perf_counter() - started)
            service.metrics.count("dmr_fail_open_total", int(failed))
            opened = await self._upstreams.open(stack, choice.decision.precision, _passed_on(body), request.stream)
            decided = choice.decision.precision
            if opened.precision != decided:
                service.metrics.count("dmr_fail_open_total")
                choice = replace(
                    choice,
                    decision=replace(choice.decision, precision=opened.precision),
                    reason="fallback",
                    propensity=1.0,
                )
            route = self._router.route
            degraded = route.index(opened.precision) > route.index(decided)
            action = begun(ask.session, choice)
            answer = _Answer(self, ask, choice, action, degraded, asked_at)
            if opened.whole is not None:
                whole = answer.whole(opened.whole)
                await stack.aclose()
                return Proxied(action, name, source, degraded, whole, None, stack)
            wants_usage = request.stream_options is not None and request.stream_options.include_usage
            return Proxied(action, name, source, degraded, None, answer.events(opened, wants_usage), stack)
        except BaseException:
            await stack.aclose()
            raise

    def done(self, ask: Ask, choice: Choice, action: Action, seconds: float) -> None:
        """The whole answer has come, in so much time: the session has taken its step."""
        self._router.acted(ask, action.precision, choice, action.command)
        ask.session.actions.append(action)
        self._service.count(action)
        if action.completion_tokens:
            self._service.metrics.observe("dmr_token_seconds", seconds / action.completion_tokens)

    def model(self, precision: str) -> str:
        return f"dmr/{self._service.settings.recipe}:{precision}"


class _Answer:
    def __init__(self, proxy: Proxy, ask: Ask, choice: Choice, action: Action, degraded: bool, asked_at: float) -> None:
        self._proxy, self._ask, self._choice, self._action, self._asked_at = proxy, ask, choice, action, asked_at
        self._own = {"model": proxy.model(action.precision)} | ({"dmr": {"degraded": True}} if degraded else {})

    def whole(self, content: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            UserError: it is no step of an agent.
        """
        choices = content["choices"]
        if choices:
            self._done(command_of(choices[0].get("message") or {}), content.get("usage"))
        return {**content, **self._own}

    async def events(self, opened: Opened, wants_usage: bool) -> AsyncIterator[str]:
        """Server-sent events. Where the upstream breaks off an error is the last one, and the step is not taken."""
        assert opened.events is not None
        written: list[str] = []
        calls: dict[int, dict[str, str]] = {}
        usage = None
        try:
            async for event in opened.events:
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    if choice.get("index", 0) == 0:
                        delta = choice.get("delta") or {}
                        written.append(delta.get("content") or "")
                        _gather(calls, delta.get("tool_calls") or [])
                if not event["choices"] and not wants_usage:
                    continue
                yield sse_event({**event, **self._own})
        except Failed as failure:
            self._proxy._service.metrics.count(
                "dmr_upstream_errors_total", precision=opened.precision, kind=failure.kind
            )
            said = "the upstream broke off; ask again, and the turn is answered anew"
            yield sse_event({"error": {"message": said, "type": "upstream_error", "param": None, "code": failure.kind}})
            return
        message = {"content": "".join(written), "tool_calls": [{"function": calls[i]} for i in sorted(calls)]}
        self._done(command_of(message), usage)
        yield "data: [DONE]\n\n"

    def _done(self, command: str, usage: object) -> None:
        usage = usage if isinstance(usage, dict) else {}
        details = usage.get("prompt_tokens_details") or {}
        action = replace(
            self._action,
            command=command,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            cached_tokens=int(details.get("cached_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
        self._proxy.done(self._ask, self._choice, action, time.perf_counter() - self._asked_at)


def _passed_on(body: dict[str, Any]) -> dict[str, Any]:
    """The request as upstreams get it: without what is ours, and with the tokens counted."""
    content = {key: value for key, value in body.items() if key not in ("dmr", "metadata", "model")}
    if content.get("stream"):
        content["stream_options"] = {**(content.get("stream_options") or {}), "include_usage": True}
    return content


def _gather(calls: dict[int, dict[str, str]], deltas: list[dict[str, Any]]) -> None:
    """Put the parts of tool calls together."""
    for delta in deltas:
        call = calls.setdefault(int(delta.get("index", 0)), {"name": "", "arguments": ""})
        for key, part in (delta.get("function") or {}).items():
            if key in call and isinstance(part, str):
                call[key] += part
