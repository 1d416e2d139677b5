"""The HTTP server as a process: it drains when it is told to stop, and ends when something breaks."""

import asyncio
import gc
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from eda.server.app import create_app
from eda.server.assembly import load_runtime
from eda.server.connections import AcceptErrors, ServerConfig, room_for_connections
from eda.server.logs import logger
from eda.server.services import Runtime, Services
from eda.server.settings import Settings


class GracefulServer(uvicorn.Server):
    """Says that it is draining as soon as it is told to stop, and ends when the engine or the loading fails."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services
        self.failure: BaseException | None = None
        services.on_failure = self._fail

    def _fail(self, error: BaseException) -> None:
        """May be called in any thread: it sets two flags."""
        self.failure = error
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, except that a signal that was obeyed is not raised again: the exit status is the server's."""
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(AcceptErrors())
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            logger().info("listening", host=host, port=port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.is_draining = True
        logger().info("draining", seconds=self._services.settings.drain_seconds)
        await super().shutdown(sockets)


def run(settings: Settings) -> int:
    """Serves until a signal comes. Returns the process's exit status: 0, or 1 when something broke."""
    services = Services(settings, load=_load)
    max_connections = room_for_connections(settings.max_connections)
    if max_connections < settings.max_connections:
        logger().warning(
            "few file descriptors", limit=max_connections, max_connections=settings.max_connections
        )
    config = ServerConfig(
        create_app(services),
        settings,
        max_connections=max_connections,
        log_config=None,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    server = GracefulServer(config, services)
    if not settings.needs_keys:
        logger().warning("no keys are set: only this machine can reach the server, and everybody on it")
    asyncio.run(server.serve())
    if server.failure is not None:
        logger().error("stopped", reason=f"{type(server.failure).__name__}: {server.failure}")
        return 1
    return 0 if server.started else 1


def _load(services: Services) -> Runtime:
    """Loads the models and takes them out of garbage collection, which large bodies would make walk through them."""
    runtime = load_runtime(services)
    gc.collect()
    gc.freeze()
    return runtime
