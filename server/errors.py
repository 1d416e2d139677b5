"""Errors that clients see, all in OpenAI's shape.

    ApiError
    ├── InvalidRequestError          400   a parameter that is wrong or not supported
    │   └── ContextLengthError       400   prompt and output do not fit the model
    ├── AuthenticationError          401   no key, or an unknown one
    ├── PermissionDeniedError        403   a valid key that may not do this
    ├── UnknownModelNameError        404   no such model or fine-tune
    ├── BodyTooLargeError            413
    ├── OverloadedError              429   the waiting queue is full; carries Retry-After
    ├── RequestFailedError           500   the model failed on this request
    ├── UnavailableError             503   starting, draining or broken; carries Retry-After
    └── TimeLimitError               504   the request's deadline passed

A body is ``{"error": {"message", "type", "param", "code"}}``, for errors of the framework too.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.engine.engine import DeadlineError, EngineStoppedError, ModelStepError, QueueFullError

RETRY_AFTER_SECONDS = 2


class ApiError(Exception):
    """An error with a status and a body.

    Args:
        message: one sentence for a person; what was given and what would be right.
        param: the request parameter at fault.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retry_after: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code if code is not None else self.code

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        return error_body(self.message, self.type, self.param, self.error_code)


class InvalidRequestError(ApiError):
    """A parameter is wrong or not supported."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """Prompt and output together are longer than the model or the cache allows."""

    code = "context_length_exceeded"


class AuthenticationError(ApiError):
    """The request has no key, or one that nobody was given."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class PermissionDeniedError(ApiError):
    """The key is valid, but not for this."""

    status = 403
    type = "permission_error"


class UnknownModelNameError(ApiError):
    """No model or fine-tune has this name."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class BodyTooLargeError(ApiError):
    """The body is larger than the server reads."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class OverloadedError(ApiError):
    """Too many requests are waiting."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after = RETRY_AFTER_SECONDS


class RequestFailedError(ApiError):
    """The model failed on this request alone."""

    status = 500
    code = "model_failure"


class UnavailableError(ApiError):
    """The server is starting, draining or broken."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"
    retry_after = RETRY_AFTER_SECONDS


class TimeLimitError(ApiError):
    """The request's deadline passed before it was finished."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


def error_body(
    message: str, type_: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The body of every error."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def from_engine(error: Exception) -> ApiError:
    """What a client is told about an error of the engine. Messages of foreign exceptions are not passed on."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return OverloadedError(str(error))
    if isinstance(error, EngineStoppedError):
        return UnavailableError(str(error))
    if isinstance(error, DeadlineError):
        return TimeLimitError(str(error))
    if isinstance(error, ModelStepError):
        return RequestFailedError("the model failed on this request; other requests are not affected")
    return RequestFailedError("an unexpected error ended this request")


def from_validation(error: RequestValidationError) -> InvalidRequestError:
    """The first thing that is wrong with a body or a query, with its place as ``param``."""
    first: Mapping[str, Any] = error.errors()[0]
    kind = first["type"]
    param = _place(first["loc"], ends_in_name=kind in ("extra_forbidden", "missing"))
    if kind == "extra_forbidden":
        return InvalidRequestError(
            f"the parameter '{param}' is not supported", param=param, code="unsupported_parameter"
        )
    if kind == "missing" and param:
        return InvalidRequestError(
            f"the parameter '{param}' is required", param=param, code="missing_required_parameter"
        )
    if kind == "json_invalid":
        return InvalidRequestError("the body is not valid JSON", code="invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ")
    given = (
        f"; got {first['input']!r:.100}" if isinstance(first.get("input"), (int, float, str, bool)) else ""
    )
    return InvalidRequestError(f"{param or 'body'}: {message}{given}", param=param, code="invalid_value")


def _place(location: tuple[int | str, ...], *, ends_in_name: bool) -> str | None:
    """``("body", "messages", 0, "content")`` to ``messages[0].content``.

    Members of unions appear as names of types (``str``, ``TextPart``), which mean nothing to a client; the last part
    is never one of them when ``ends_in_name``.
    """
    text = ""
    parts = location[1:]
    for place, part in enumerate(parts):
        if isinstance(part, int):
            text += f"[{part}]"
        elif (ends_in_name and place == len(parts) - 1) or not _is_type_name(part):
            text += f".{part}" if text else part
    return text or None


def _is_type_name(part: str) -> bool:
    return not part.isidentifier() or part in ("str", "int", "float", "bool") or part[0].isupper()


def install_handlers(app: FastAPI) -> None:
    """Makes every error that leaves ``app`` an OpenAI error."""

    async def api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status, error.headers)

    async def validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await api_error(request, from_validation(error))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        codes = {404: "not_found", 405: "method_not_allowed"}
        messages = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.method} is not allowed at {request.url.path}",
        }
        message = messages.get(error.status_code, str(error.detail))
        return JSONResponse(
            error_body(message, kind, None, codes.get(error.status_code)),
            error.status_code,
            dict(error.headers or {}),
        )

    async def unexpected_error(request: Request, error: Exception) -> JSONResponse:
        # The log has the details; a client learns nothing about the inside.
        return JSONResponse(
            error_body("an unexpected error occurred", "server_error", None, "internal_error"), 500
        )

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected_error)
