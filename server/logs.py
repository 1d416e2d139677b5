"""Structured logs: one line for each request, without prompts."""

import logging
import sys
from typing import Any

import structlog

from eda.server.settings import Settings


class _StandardHandler(logging.StreamHandler[Any]):
    """Told apart from handlers that others have added."""


def configure_logs(settings: Settings) -> None:
    """Sets up structlog for the process; lines go to standard error."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    marks: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any
    if settings.log_format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[*marks, structlog.processors.format_exc_info, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # What the packages below and uvicorn say through the standard library comes out in the same form.
    handler = _StandardHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=marks,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    for earlier in [other for other in root.handlers if isinstance(other, _StandardHandler)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    logging.getLogger("eda").setLevel(level)


def logger() -> Any:
    """The server's logger; what it prints depends on ``configure_logs``."""
    return structlog.get_logger("eda")
