"""Limits on connections: how many there are, and how long one may hold its place without getting on."""

import asyncio
import json
import resource
import time
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from eda.server.errors import UnavailableError
from eda.server.logs import logger
from eda.server.settings import Settings

BACKLOG = 128
"""Connections that the system keeps until they are accepted. Without file descriptors, asyncio tries that many times in
a row."""
OTHER_DESCRIPTORS = 128
"""File descriptors for models, database, worker and libraries."""
FEWEST_CONNECTIONS = 8
SMALL_PIECES = 4096
SMALL_PIECE_BYTES = 64
"""A body may come in this many pieces of fewer bytes on average."""
LOG_PAUSE_SECONDS = 60.0


class ServerConfig(uvicorn.Config):
    """uvicorn's settings, with this server's limits on connections.

    Args:
        max_connections: as ``settings.max_connections``, or fewer.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, *, max_connections: int | None = None, **options: Any
    ) -> None:
        super().__init__(
            app,
            host=settings.host,
            port=settings.port,
            http=BoundedProtocol,
            ws="none",
            access_log=False,
            backlog=BACKLOG,
            **options,
        )
        self.head_seconds = settings.head_seconds
        self.unread_seconds = settings.unread_seconds
        self.max_connections = max_connections or settings.max_connections


class BoundedParser(h11.Connection):
    """h11's parser, which refuses bodies in very many tiny pieces: each costs it microseconds, and a body of a few MB
    can have a million of them.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._num_pieces = 0
        self._num_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > SMALL_PIECES and self._num_bytes < SMALL_PIECE_BYTES * self._num_pieces:
                raise h11.RemoteProtocolError("the body comes in too many small pieces")
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's connection, which ends when nothing gets on: when the head of a request does not arrive, or when nobody
    reads the answer. uvicorn itself only ends connections that are silent after an answer.
    """

    config: ServerConfig

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = BoundedParser()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        now = self.loop.time()
        self._idle_since = now
        self._read_at = now
        self._num_unsent = 0
        self._last_cycle: RequestResponseCycle | None = None
        self._pause = min(1.0, self.config.head_seconds / 4, self.config.unread_seconds / 4)
        self._timer = self.loop.call_later(self._pause, self._watch)
        if len(self.connections) > self.config.max_connections:
            transport.write(_refusal())
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        now, num_unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if num_unsent == 0 or num_unsent < self._num_unsent:
            self._read_at = now
        self._num_unsent = num_unsent
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if is_busy or num_unsent or self.cycle is not self._last_cycle:
            self._idle_since = now
        self._last_cycle = self.cycle
        if (
            now - self._read_at > self.config.unread_seconds
            or now - self._idle_since > self.config.head_seconds
        ):
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(self._pause, self._watch)


def _refusal() -> bytes:
    """An answer for which no request was read."""
    error = UnavailableError("too many connections are open")
    body = json.dumps(error.body()).encode()
    head = [
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in error.headers.items()),
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


class AcceptErrors:
    """A loop's exception handler that tells of missing file descriptors once a minute.

    asyncio reports every attempt to accept, with a traceback each.
    """

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" not in context["message"]:
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + LOG_PAUSE_SECONDS
            logger().error("no connection can be accepted", reason=str(context.get("exception")))


def room_for_connections(wanted: int) -> int:
    """How many of ``wanted`` connections the process has file descriptors for, after asking for more of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    return max(FEWEST_CONNECTIONS, soft - OTHER_DESCRIPTORS)
