"""Stand-ins of OpenAI-compatible servers that behave, or misbehave as they are told."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class StandIn:
    """Answers each conversation with a command that tells how often it was asked."""

    name: str
    faults: list[str] = field(default_factory=list)
    """Of the next requests, one each: a status, hang, reset, midway or garbage; it behaves once there are none left."""
    always: str = ""
    """A fault of every request."""
    model: str = ""
    """What it has, where that is not called as it is; another one is not found."""
    special: bool = False
    """It begins a text with a token of its own, unless it is told not to."""
    pause: float = 0.0
    """Seconds between the parts of a stream."""
    tool: str = ""
    """It calls this tool instead of writing a command."""
    tool_type: str = "function"
    """custom: by OpenAI's other kind of call, where the answer is not streamed."""
    tokens: int = 0
    """Added to each token's id."""
    template: str = "{}"
    """Of a message."""
    retry_after: str = "0.05"
    """Said with a 429."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    ended: int = 0
    """Answers that went through, or that somebody has left."""
    left: int = 0
    """Those that somebody has left."""
    address: str = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/apply-template", self.apply_template, methods=["POST"]),
            ]
        )

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.model or self.name, "object": "model"}]})

    async def tokenize(self, request: Request) -> Response:
        asked = await request.json()
        begin = [1] if self.special and asked.get("add_special_tokens", True) else []
        return JSONResponse({"tokens": [*begin, *(self.tokens + ord(letter) for letter in asked.get("prompt", ""))]})

    async def apply_template(self, request: Request) -> Response:
        messages = (await request.json())["messages"]
        return JSONResponse({"prompt": "".join(self.template.format(message["content"]) for message in messages)})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        fault = self.always or (self.faults.pop(0) if self.faults else "")
        if self.model and body["model"] != self.model:
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if fault == "hang":
            try:
                while not await request.is_disconnected():
                    await asyncio.sleep(0.01)
            finally:
                self.left += 1
            return Response()
        if fault.isdigit():
            headers = {"retry-after": self.retry_after} if fault == "429" else {}
            return JSONResponse({"error": {"message": f"fault {fault}"}}, int(fault), headers)
        if fault == "garbage":
            return Response(b"<html>oops", media_type="text/html")
        text = f"look {self.name}"
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        common = {"id": "1", "created": 1, "model": self.name}
        if not body.get("stream"):
            if fault in ("reset", "midway"):
                return StreamingResponse(self.broken(b'{"choi'), headers={"content-length": "1000"})
            message = {"role": "assistant", "content": text}
            if self.tool:
                message = {"role": "assistant", "content": None, "tool_calls": [self.call()]}
            choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if self.tool else "stop"}
            return JSONResponse({**common, "object": "chat.completion", "choices": [choice], "usage": usage})
        return StreamingResponse(self.chunks(common, text, usage, fault), media_type="text/event-stream")

    def call(self) -> dict[str, Any]:
        function = {"name": self.tool, "arguments": f'{{"what": "{self.name}"}}'}
        return {"id": "call-1", "type": self.tool_type, self.tool_type: function}

    async def broken(self, beginning: bytes):
        yield beginning
        raise ConnectionError

    async def chunks(self, common: dict[str, Any], text: str, usage: dict[str, int], fault: str):
        parts = [{"content": part} for part in (text[:4], text[4:])]
        if self.tool:
            begun, rest = self.call(), {"function": {"arguments": f'"{self.name}"}}'}}
            begun["function"]["arguments"] = '{"what": '
            parts = [{"tool_calls": [{"index": 0, **call}]} for call in (begun, rest)]
        deltas = [{"role": "assistant", "content": ""}, *parts, {}]
        try:
            for i, delta in enumerate(deltas):
                if (fault, i) in (("reset", 0), ("midway", 2)):
                    raise ConnectionError
                finish = "stop" if i == len(deltas) - 1 else None
                choice = {"index": 0, "delta": delta, "finish_reason": finish}
                yield f"data: {json.dumps({**common, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
                await asyncio.sleep(self.pause)
                while fault == "endless" and i == 2:
                    await asyncio.sleep(0.01)
                    yield f"data: {json.dumps({**common, 'choices': [{'index': 0, 'delta': {'content': '.'}}]})}\n\n"
            yield f"data: {json.dumps({**common, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        except (GeneratorExit, asyncio.CancelledError):
            self.left += 1
            raise
        finally:
            self.ended += 1


@contextmanager
def stand_ins(*names: str) -> Iterator[dict[str, StandIn]]:
    """A server each, in threads of their own."""
    servers, threads, found = [], [], {}
    for name in names:
        found[name] = StandIn(name)
        config = uvicorn.Config(found[name].app(), port=0, log_level="critical", timeout_graceful_shutdown=1)
        servers.append(uvicorn.Server(config))
        threads.append(threading.Thread(target=servers[-1].run, daemon=True))
        threads[-1].start()
    try:
        for name, server in zip(names, servers, strict=True):
            while not server.started:
                threads[0].join(0.01)
            found[name].address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        yield found
    finally:
        for server in servers:
            server.should_exit = True
        for thread in threads:
            thread.join(timeout=30)
