"""The server as a process."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from dmr_pipeline import interrupts
from dmr_pipeline.serve.app import make_app, refuse_open_door
from dmr_pipeline.serve.metrics import Metrics
from dmr_pipeline.serve.service import Service
from dmr_pipeline.serve.settings import ServeSettings
from dmr_pipeline.serve.upstreams import Upstreams, refuse_differences

_LAST_SECONDS = 4
"""For answers that have begun, once the server is told to end."""


def server_of(service: Service) -> uvicorn.Server:
    settings = service.settings
    return uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
    )


def serve(settings: ServeSettings, on_ready: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM: answers that have begun are finished, and sessions that go on are kept for the next server.

    Args:
        on_ready: called with the server's address once it answers.

    Raises:
        UserError: an artifact is missing, others could reach the server without a key, or the upstreams are of different models.
    """
    refuse_open_door(settings)
    if settings.upstreams:
        refuse_differences(asyncio.run(_differences(settings)))
    server, ended = server_of(Service(settings)), threading.Event()

    def stop() -> None:
        server.should_exit = True
        ended.wait()

    def tell() -> None:
        while not server.started:
            if ended.wait(0.02):
                return
        on_ready(_address(server))

    threading.Thread(target=tell, daemon=True).start()
    with interrupts.farewell(stop):
        try:
            server.run()
        finally:
            ended.set()


async def _differences(settings: ServeSettings) -> list[str]:
    upstreams = Upstreams(settings, list(settings.upstreams), Metrics())
    try:
        return await upstreams.check()
    finally:
        await upstreams.close()


def _address(server: uvicorn.Server) -> str:
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def running(service: Service) -> Iterator[str]:
    """The server in a thread of this process; gives its address."""
    server = server_of(service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server has not started")
            thread.join(0.01)
        yield _address(server)
    finally:
        server.should_exit = True
        thread.join()
