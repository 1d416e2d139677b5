"""The application: routes, middleware, and what happens at start and at shutdown."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi

from eda.server.engine.engine import EngineStoppedError
from eda.server.error_handlers import install_handlers
from eda.server.logs import logger
from eda.server.middleware import GateMiddleware, RequestLogMiddleware
from eda.server.routes import adapters, chat, completions, jobs, models, operations
from eda.server.routes.operations import package_version
from eda.server.schemas.responses import ErrorResponse
from eda.server.services import Runtime, Services

GRACE_SECONDS = 60.0
"""How long a last step may take at shutdown."""
STALLED_GRACE_SECONDS = 1.0


def create_app(services: Services) -> FastAPI:
    """An ASGI application around ``services``. Models are loaded when it starts, in a thread."""
    app = FastAPI(
        title="EDA inference server",
        version=package_version(),
        summary="OpenAI-compatible inference with per-domain draft adapters",
        lifespan=_lifespan,
        redoc_url=None,
        responses={
            "4XX": {"model": ErrorResponse, "description": "The request cannot be served as it is"},
            "5XX": {"model": ErrorResponse, "description": "The server cannot serve the request"},
        },
    )
    app.state.services = services
    install_handlers(app)
    for module in (completions, chat, models, operations, adapters, jobs):
        app.include_router(module.router)
    # The last one added is the first to see a request.
    app.add_middleware(GateMiddleware, services=services)
    origins = services.settings.allowed_origins
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(RequestLogMiddleware)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    loading = asyncio.create_task(_start(services))
    watching = asyncio.create_task(_watch_engine(services))
    try:
        yield
    finally:
        services.is_draining = True
        watching.cancel()
        # A load that is under way cannot be interrupted: it runs in a thread.
        await asyncio.gather(loading, return_exceptions=True)
        if services.runtime is not None:
            broken = services.failure is not None
            await services.runtime.engine.stop(
                0.0 if broken else services.settings.drain_seconds,
                grace_seconds=STALLED_GRACE_SECONDS if broken else GRACE_SECONDS,
            )
            await asyncio.to_thread(services.runtime.on_close)


async def _watch_engine(services: Services) -> None:
    """Ends the process when a step does not end: a device that hangs says nothing, and nobody may wait for ever."""
    limit = services.settings.stall_seconds
    while True:
        await asyncio.sleep(min(limit / 4, 5.0))
        if services.runtime is None:
            continue
        seconds = services.runtime.engine.seconds_without_progress
        if seconds > limit:
            error = EngineStoppedError(f"the engine stands still: no step has ended for {seconds:.0f} s")
            services.failure = error
            services.runtime.engine.give_up(error)
            services.on_failure(error)
            return


async def _start(services: Services) -> None:
    """Loads the models, if need be, and starts the engine. A failure is kept for ``/health`` and reported."""
    try:
        runtime = services.runtime
        if runtime is None:
            if services.load is None:
                raise RuntimeError("there is neither a runtime nor a way to load one")
            runtime = await asyncio.to_thread(services.load, services)
        await _begin(services, runtime)
    except Exception as error:
        services.failure = error
        services.on_failure(error)
        return
    logger().info("ready", models=runtime.registry.model_names())


async def _begin(services: Services, runtime: Runtime) -> None:
    engine = runtime.engine
    services.metrics.watch(lambda: engine.num_running, lambda: engine.num_waiting)
    await engine.start()
    runtime.on_start()
    services.runtime = runtime


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description without the framework's own 422, which this server never sends."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
