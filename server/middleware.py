"""What happens around every request: an id, a log line, keys, and a limit on the body.

Plain ASGI, because a stream must neither be buffered nor lose the client's disconnect.
"""

import time
import uuid
from collections import deque
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import OPEN_PATHS, KeyRing
from server.errors import ApiError, BodyTooLargeError
from server.logs import logger

CLIENT_CLOSED_REQUEST = 499
QUIET_PATHS = ("/health", "/ready", "/metrics")


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
    """Turns away requests without the right key or with too large a body, before anything of them is read."""

    def __init__(self, app: ASGIApp, keys: KeyRing, max_body_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._keys.refusal(scope)
        if refusal is None and scope["path"] not in OPEN_PATHS:
            refusal = self._stated_size(scope)
        if refusal is not None:
            await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, send)
            return

        # Read here and not by the route: the framework would report an error from receive() as a bad body.
        messages: deque[Message] = deque()
        received = 0
        while True:
            message = await receive()
            messages.append(message)
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                refusal = self._too_large()
                await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, send)
                return
            if not message.get("more_body", False):
                break

        async def replay() -> Message:
            return messages.popleft() if messages else await receive()

        await self._app(scope, replay, send)

    def _stated_size(self, scope: Scope) -> ApiError | None:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_body_bytes:
                return self._too_large()
        return None

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body is larger than {self._max_body_bytes} bytes")
