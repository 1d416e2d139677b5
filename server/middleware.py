"""What happens around every request: an id, a log line, keys, and limits on the body and the rate.

Plain ASGI, because a stream must neither be buffered nor lose the client's disconnect.
"""

import asyncio
import math
import time
import uuid
from collections import deque
from contextlib import suppress
from typing import Any

from fastapi.responses import JSONResponse
from limits import parse as parse_rate
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eda.server.auth import ADMINISTRATOR, OPEN_PATHS, Client, KeyRing
from eda.server.bodies import check_json
from eda.server.errors import ApiError, BodyTimeoutError, BodyTooLargeError, RateLimitError, UnavailableError
from eda.server.logs import logger
from eda.server.services import Services

CLIENT_CLOSED_REQUEST = 499
QUIET_PATHS = ("/health", "/ready", "/metrics")
LARGE_BODY = 64 * 1024
"""Bytes of a body above which parsing it takes turns."""
LONGEST_TURN = 0.25
"""Seconds."""
DRAIN_POLL_SECONDS = 0.5
"""How often a body that does not come looks whether the server shuts down."""


class RequestLogMiddleware:
    """Gives each request an id (``x-request-id``) and writes one line when it has ended.

    Routes add to the line through ``request.state.log``, a dictionary.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        details: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, log=details)
        status = CLIENT_CLOSED_REQUEST
        start = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        error: BaseException | None = None
        try:
            await self._app(scope, receive, send_with_id)
        except BaseException as raised:
            error = raised
            if isinstance(raised, Exception) and status == CLIENT_CLOSED_REQUEST:
                status = 500  # what the framework answers, outside of this middleware
            raise
        finally:
            path = scope["path"]
            write = logger().info if path not in QUIET_PATHS else logger().debug
            if status >= 500 and isinstance(error, Exception):
                details["exc_info"] = error
                write = logger().error
            write(
                "request",
                id=request_id,
                method=scope["method"],
                path=path,
                status=details.pop("status", status),
                latency_ms=round(1000 * (time.monotonic() - start), 1),
                **details,
            )


class GateMiddleware:
    """Turns away what the application must not see: requests without the right key, too many of them, pages of other
    sites, and bodies that are too large, too slow or hold too many values.

    ``scope["state"]["client"]`` says who sent what gets through.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services
        self._keys = KeyRing(services.settings)
        self._rates = RateLimits(services.settings.rate_limit)
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            client = self._keys.admit(scope)
            if isinstance(client, ApiError):
                raise client
            scope.setdefault("state", {})["client"] = client
            if scope["path"] not in OPEN_PATHS:
                self._rates.count(client)
                self._check_stated_size(scope)
            # Read here and not by the route: the framework would report an error from receive() as a bad body.
            body = await self._read(receive)
            is_form = _is_form(scope)
            if not is_form:
                check_json(body, self._services.settings.max_body_values)
        except ClientDisconnect:
            return
        except ApiError as refusal:
            await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, send)
            return

        messages: deque[Message] = deque([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return messages.popleft() if messages else await receive()

        if is_form or len(body) <= LARGE_BODY:
            await self._app(scope, replay, send)
        else:
            await self._turns.run(self._app, scope, replay, send)

    async def _read(self, receive: Receive) -> bytes:
        """The whole body. Raises ``ApiError`` when it is too large or too slow, and when the server shuts down."""
        limit, seconds = self._services.settings.max_body_bytes, self._services.settings.body_seconds
        deadline = time.monotonic() + seconds
        pieces: list[bytes] = []
        size = 0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(DRAIN_POLL_SECONDS, seconds)):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > limit:
                    raise self._too_large()
                if not message.get("more_body", False):
                    return b"".join(pieces)
            if self._services.is_draining:
                raise UnavailableError("the server is shutting down")
            if time.monotonic() > deadline:
                raise BodyTimeoutError(f"the body did not arrive within {seconds:g} seconds")

    def _check_stated_size(self, scope: Scope) -> None:
        limit = self._services.settings.max_body_bytes
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > limit:
                raise self._too_large()

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body is larger than {self._services.settings.max_body_bytes} bytes")


def _is_form(scope: Scope) -> bool:
    """Forms are parsed piece by piece, and their JSON is counted where it is taken out."""
    content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return bytes(content_type).lower().startswith(b"multipart/")


class RateLimits:
    """How often one client may ask. The administration key is not counted.

    Args:
        rate: as ``60/minute``; ``None`` for no limit.
    """

    def __init__(self, rate: str | None) -> None:
        self._rate = rate
        self._item = parse_rate(rate) if rate is not None else None
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage()) if rate is not None else None

    def count(self, client: Client) -> None:
        """Counts a request. Raises ``RateLimitError`` when it is one too many."""
        if self._limiter is None or self._item is None or client.name == ADMINISTRATOR:
            return
        if not self._limiter.hit(self._item, client.name):
            reset = self._limiter.get_window_stats(self._item, client.name).reset_time
            raise RateLimitError(
                f"more requests than {self._rate} were sent", max(1, math.ceil(reset - time.time()))
            )


class Turns:
    """Large bodies are parsed one after the other, with as much time between two as one takes.

    Parsing and validating hold the event loop. Without turns, many large bodies that come together would hold it for
    all of their times in one.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs ``app``, whose turn is over when it has read the body and goes on to read or to send something else, or
        after ``LONGEST_TURN``: then it waits for something else than the event loop.
        """
        await self._lock.acquire()
        start: float | None = time.monotonic()
        loop = asyncio.get_running_loop()

        def end() -> None:
            nonlocal start
            if start is not None:
                loop.call_later(min(time.monotonic() - start, LONGEST_TURN), self._lock.release)
                start = None

        loop.call_later(LONGEST_TURN, end)
        num_received = 0

        async def receive_and_end() -> Message:
            nonlocal num_received
            num_received += 1
            if num_received > 1:
                end()
            return await receive()

        async def end_and_send(message: Message) -> None:
            end()
            await send(message)

        try:
            await app(scope, receive_and_end, end_and_send)
        finally:
            end()
