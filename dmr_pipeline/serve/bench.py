"""How quick a server is, and what its sessions take: `dmr bench serve`. Server, upstreams and client are processes apart."""

import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import quantiles

import httpx2 as httpx
import psutil

from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel

TURNS = 4
_OBSERVATIONS = (
    "You are in a room. You see a fridge 1, and a desk 1.\nYour task is to: put a mug in desk.",
    "You see a mug 1.",
)
_PATIENCE = 120.0


class Row(FrozenModel):
    """So many sessions at once, each of `TURNS` turns one after another."""

    way: str
    """in process; upstream alone; through the server."""
    sessions: int
    requests: int
    lost: int
    """Requests without a good answer."""
    per_second: float
    p50_ms: float
    p99_ms: float


class ServeRecord(FrozenModel):
    recipe: str
    rows: list[Row]
    added_p50_ms: float
    """By the server, over the upstream alone, one session at a time."""
    added_p99_ms: float
    held_sessions: int
    bytes_a_session: float
    """Of the server's memory, in process, for so many sessions of `TURNS` turns: what is kept of each, and keys and values in as
    many places as there are."""


class Case(FrozenModel):
    """How much is measured."""

    at_once: tuple[int, ...] = (1, 16, 64)
    episodes: int = 64
    held: int = 500
    soak_seconds: float = 0.0


QUICK = Case(at_once=(1, 4), episodes=4, held=8)


def bench_serve(recipe: str, rung: str, cheaper: str, case: Case) -> ServeRecord:
    """
    Args:
        rung, cheaper: two routed rungs. Upstreams are driven with the first throughout: a stand-in's answers mean nothing to a
            router. What it decides is measured in process.

    Raises:
        UserError: a server does not start.
    """
    rows = []
    model = f"dmr/{recipe}"
    with _server(recipe) as (address, process):
        _drive("first", address, model, 1, 1, prefix="first")
        before = process.memory_info().rss
        _drive("held", address, model, 16, case.held, prefix="held")
        a_session = max(0, process.memory_info().rss - before) / case.held
        for at_once in case.at_once:
            rows.append(_drive("in process", address, model, at_once, max(case.episodes, at_once)))
    with ExitStack() as stack:
        echo = stack.enter_context(_echo())
        upstreams = [f"{name}={echo}" for name in (rung, cheaper)]
        proxy, _ = stack.enter_context(_server(recipe, *(f"--upstream={text}" for text in upstreams)))
        for at_once in case.at_once:
            episodes = max(case.episodes, at_once)
            rows.append(_drive("upstream alone", echo, "echo", at_once, episodes))
            rows.append(_drive("through the server", proxy, f"{model}:{rung}", at_once, episodes))
    if case.soak_seconds:
        rows.append(_soak(recipe, rung, cheaper, case))
    alone, through = (next(row for row in rows if row.way == way) for way in ("upstream alone", "through the server"))
    return ServeRecord(
        recipe=recipe,
        rows=rows,
        added_p50_ms=through.p50_ms - alone.p50_ms,
        added_p99_ms=through.p99_ms - alone.p99_ms,
        held_sessions=case.held,
        bytes_a_session=a_session,
    )


def _soak(recipe: str, rung: str, cheaper: str, case: Case) -> Row:
    """Upstreams of which one request in ten fails, for so long."""
    rows = list[Row]()
    with ExitStack() as stack:
        upstreams = [f"--upstream={name}={stack.enter_context(_echo(10))}" for name in (rung, cheaper)]
        address, _ = stack.enter_context(_server(recipe, *upstreams))
        end = time.monotonic() + case.soak_seconds
        while not rows or time.monotonic() < end:
            model = f"dmr/{recipe}:{cheaper}"
            rows.append(_drive("soak", address, model, 16, 64, prefix=f"soak-{len(rows)}"))
    return Row(
        way="one upstream request in ten fails",
        sessions=16,
        requests=sum(row.requests for row in rows),
        lost=sum(row.lost for row in rows),
        per_second=sum(row.per_second for row in rows) / len(rows),
        p50_ms=max(row.p50_ms for row in rows),
        p99_ms=max(row.p99_ms for row in rows),
    )


def _drive(way: str, address: str, model: str, at_once: int, episodes: int, prefix: str = "s") -> Row:
    started = time.perf_counter()
    seconds, lost = asyncio.run(_play(address, model, at_once, episodes, f"{prefix}-{at_once}"))
    spent = time.perf_counter() - started
    cuts = quantiles(seconds, n=100) if len(seconds) > 1 else [*seconds, 0.0] * 50
    return Row(
        way=way,
        sessions=at_once,
        requests=len(seconds),
        lost=lost,
        per_second=len(seconds) / spent,
        p50_ms=1000 * cuts[49],
        p99_ms=1000 * cuts[98],
    )


async def _play(address: str, model: str, at_once: int, episodes: int, prefix: str) -> tuple[list[float], int]:
    """Seconds of each request, and how many were lost."""
    seconds, lost, free = list[float](), 0, asyncio.Semaphore(at_once)

    async def episode(number: int) -> None:
        nonlocal lost
        messages = [{"role": "user", "content": _OBSERVATIONS[0]}]
        async with free:
            for _ in range(TURNS):
                begun = time.perf_counter()
                answer = await http.post(
                    f"{address}/chat/completions",
                    json={"model": model, "messages": messages},
                    headers={"x-session-id": f"{prefix}-{number}"},
                )
                seconds.append(time.perf_counter() - begun)
                if answer.status_code != 200:
                    lost += 1
                    return
                said = answer.json()["choices"][0]["message"]["content"]
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": _OBSERVATIONS[1]}]

    async with httpx.AsyncClient(timeout=_PATIENCE, limits=httpx.Limits(max_connections=at_once)) as http:
        await asyncio.gather(*(episode(number) for number in range(episodes)))
    return seconds, lost


@contextmanager
def _server(recipe: str, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "dmr_pipeline", "serve", recipe, "--port", "0", *options]
    with _started(command, r"http://\S+/v1") as (address, process):
        yield address, psutil.Process(process.pid)


@contextmanager
def _echo(fail_every: int = 0) -> Iterator[str]:
    with _started([sys.executable, "-m", "dmr_pipeline.serve.echo", str(fail_every)], r"http://\S+/v1") as (address, _):
        yield address


@contextmanager
def _started(command: Sequence[str], pattern: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A process that says where it listens.

    Raises:
        UserError: it ends without having said so.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.strip())
            if found := re.search(pattern, line):
                # What it says later is read too: a full pipe would stop it.
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield found[0], process
                return
        raise UserError(f"the server has not started: {said[-1] if said else 'it said nothing'}")
    finally:
        process.kill()
        process.wait()
