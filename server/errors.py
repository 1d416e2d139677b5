"""Errors that clients see, all in OpenAI's shape.

    ApiError
    ├── InvalidRequestError          400   a parameter that is wrong or not supported
    │   └── ContextLengthError       400   prompt and output do not fit the model
    ├── AuthenticationError          401   no key, or an unknown one
    ├── PermissionDeniedError        403   a valid key that may not do this
    ├── UnknownModelNameError        404   no such model or fine-tune
    ├── BodyTimeoutError             408   the body did not arrive in time
    ├── BodyTooLargeError            413
    ├── OverloadedError              429   the waiting queue is full; carries Retry-After
    ├── RateLimitError               429   this key asks too often; carries Retry-After
    ├── RequestFailedError           500   the model failed on this request
    ├── UnavailableError             503   starting, draining or broken; carries Retry-After
    └── TimeLimitError               504   the request's deadline passed

A body is ``{"error": {"message", "type", "param", "code"}}``, for errors of the framework too.
"""

from typing import Any, ClassVar

from eda.errors import NonFiniteLogitsError
from eda.server.engine.engine import DeadlineError, EngineStoppedError, ModelStepError, QueueFullError

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
    code = "invalid_value"


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


class BodyTimeoutError(ApiError):
    """The body did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    code = "body_timeout"

    @property
    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}


class BodyTooLargeError(ApiError):
    """The body is larger than the server reads, or holds more values."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class OverloadedError(ApiError):
    """Too many requests are waiting."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after = RETRY_AFTER_SECONDS


class RateLimitError(ApiError):
    """This key, or this address, asks too often."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self._retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self._retry_after)}


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
    if isinstance(error, ModelStepError) and isinstance(error.__cause__, NonFiniteLogitsError):
        return RequestFailedError(str(error.__cause__), code="non_finite_logits")
    if isinstance(error, ModelStepError):
        return RequestFailedError("the model failed on this request; other requests are not affected")
    return RequestFailedError("an unexpected error ended this request")
