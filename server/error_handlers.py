"""Makes every error that leaves the application an OpenAI error, those of the framework included."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from eda.server.errors import ApiError, error_body
from eda.server.validation import from_problems

_UNREADABLE = "There was an error parsing the body"
"""All that the framework says of a body that is no UTF-8."""
_CODES = {404: "not_found", 405: "method_not_allowed"}


def install_handlers(app: FastAPI) -> None:
    """Registers the handlers of all errors with ``app``."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await _api_error(request, from_problems(error.errors()))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    messages = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.method} is not allowed at {request.url.path}",
    }
    message = messages.get(error.status_code, str(error.detail))
    if error.status_code == 400 and message == _UNREADABLE:
        message = "the body cannot be read; it must be JSON in UTF-8"
    return JSONResponse(
        error_body(message, kind, None, _CODES.get(error.status_code)),
        error.status_code,
        dict(error.headers or {}),
    )


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    # The log has the details; a client learns nothing about the inside.
    return JSONResponse(
        error_body("an unexpected error occurred", "server_error", None, "internal_error"), 500
    )
