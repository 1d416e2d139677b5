"""Errors of the adapter service as HTTP answers."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from eda.adapters.database import UNAVAILABLE
from eda.adapters.errors import (
    AdapterServiceError,
    ConflictError,
    CorruptVersionError,
    InvalidInputError,
    NotFoundError,
    QueueFullError,
    StorageFullError,
    TooLargeError,
)
from eda.server.errors import (
    ApiError,
    BodyTooLargeError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    UnavailableError,
)
from eda.server.logs import logger


class ResourceNotFoundError(ApiError):
    """No adapter, version or job of this name."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class StateConflictError(ApiError):
    """Right in itself, wrong in the present state."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class InsufficientStorageError(ApiError):
    """The disk or the memory cannot hold it."""

    status = 507
    type = "insufficient_storage_error"
    code = "insufficient_storage"


class JobQueueFullError(OverloadedError):
    """Too many adaptation jobs wait."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self._retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self._retry_after)}


def from_service(error: AdapterServiceError) -> ApiError:
    """What a client is told about an error of the adapter service."""
    message = str(error)
    match error:
        case QueueFullError():
            return JobQueueFullError(message, error.retry_after)
        case InvalidInputError():
            return InvalidRequestError(message, param=error.param, code="invalid_value")
        case NotFoundError():
            return ResourceNotFoundError(message, param=error.param)
        case ConflictError():
            return StateConflictError(message, param=error.param)
        case CorruptVersionError():
            return StateConflictError(message, param="version", code="unusable_version")
        case TooLargeError():
            return BodyTooLargeError(message, param=error.param)
        case StorageFullError():
            return InsufficientStorageError(message, param=error.param)
    return RequestFailedError("the adapter service failed on this request")


class AdapterRoute(APIRoute):
    """A route whose service errors become answers in OpenAI's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except AdapterServiceError as error:
                raise from_service(error) from error
            except UNAVAILABLE as error:
                logger().error("the database does not answer", reason=str(error.orig))
                raise UnavailableError(
                    "the database of adapters and jobs does not answer; try later"
                ) from error

        return handle_errors
