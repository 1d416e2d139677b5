"""`eda serve`: the server."""

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn

from server.app import create_app
from server.loading import load_runtime
from server.logs import configure_logs, logger
from server.models import model_paths
from server.services import Services
from server.settings import ConfigurationError, Settings, load_settings

PATH = "Paths"
ENGINE = "Engine"


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
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            logger().info("listening", host=host, port=port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.is_draining = True
        logger().info("draining", seconds=self._services.settings.drain_seconds)
        await super().shutdown(sockets)


def serve(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.", envvar="EDA_CONFIG")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [8000]")] = None,
    models_dir: Annotated[
        Path | None, typer.Option(help="Family of models. [bundled]", rich_help_panel=PATH)
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="Base model directory. [models_dir/base]", rich_help_panel=PATH)
    ] = None,
    draft: Annotated[
        Path | None, typer.Option(help="Shared draft directory. [models_dir/draft]", rich_help_panel=PATH)
    ] = None,
    no_draft: Annotated[
        bool, typer.Option("--no-draft", help="Serve without a draft.", rich_help_panel=PATH)
    ] = False,
    fine_tune: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DIRECTORY; may be repeated. [the others in models_dir]", rich_help_panel=PATH
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where adapters and jobs are kept. [./var]", rich_help_panel=PATH)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32 or bfloat16. [auto]", rich_help_panel=ENGINE)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:1. [auto]", rich_help_panel=ENGINE)
    ] = None,
    num_threads: Annotated[
        int | None, typer.Option(help="CPU threads of the model. [all cores]", rich_help_panel=ENGINE)
    ] = None,
    cache_mib: Annotated[
        int | None,
        typer.Option(help="Memory of the key/value cache, MiB. [what fits]", rich_help_panel=ENGINE),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest sequence, tokens. [the model's, or what fits]", rich_help_panel=ENGINE),
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(help="Sequences in a batch. [64]", rich_help_panel=ENGINE)
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(help="Sequences that may wait. [256]", rich_help_panel=ENGINE)
    ] = None,
    max_tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens in one target pass. [512]", rich_help_panel=ENGINE)
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="File of `eda bench calibrate`. [a built-in table]", rich_help_panel=ENGINE),
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds until a request is given up. [600]")
    ] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(help="Seconds that requests get at shutdown. [30]")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json. [console]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [info]")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective settings and end.")
    ] = False,
) -> None:
    """Serve models over HTTP. Every setting can also be given as `EDA_<NAME>` or in the TOML file.

    Without flags: the bundled family on 127.0.0.1:8000, data in ./var. Keys come from EDA_API_KEYS,
    EDA_API_KEYS_FILE, EDA_ADMIN_KEY and EDA_ADMIN_KEY_FILE; without an administration key only loopback addresses are
    allowed.
    """
    overrides: dict[str, Any] = {
        "host": host,
        "port": port,
        "models_dir": models_dir,
        "target": target,
        "draft": draft,
        "no_draft": no_draft or None,
        "data_dir": data_dir,
        "dtype": dtype,
        "device": device,
        "num_threads": num_threads,
        "cache_mib": cache_mib,
        "max_model_len": max_model_len,
        "max_running": max_running,
        "max_waiting": max_waiting,
        "max_tokens_per_step": max_tokens_per_step,
        "calibration": calibration,
        "request_timeout": request_timeout,
        "drain_seconds": drain_seconds,
        "log_format": log_format,
        "log_level": log_level,
        "fine_tunes": _fine_tunes(fine_tune),
    }
    try:
        settings = load_settings(config, overrides)
    except ConfigurationError as error:
        raise _refusal(error) from error
    if print_config:
        typer.echo(json.dumps(settings.printable(), indent=2))
        return
    try:
        model_paths(settings)  # what is missing is told before anything is started
    except ConfigurationError as error:
        raise _refusal(error) from error
    configure_logs(settings)
    raise typer.Exit(run(settings))


def run(settings: Settings) -> int:
    """Serves until a signal comes. Returns the process's exit status: 0, or 1 when something broke."""
    services = Services(settings, load=load_runtime)
    config = uvicorn.Config(
        create_app(services),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
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


def _fine_tunes(given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    pairs = [item.partition("=") for item in given]
    if not all(name and path for name, _, path in pairs):
        raise _refusal(ConfigurationError("--fine-tune must look like NAME=DIRECTORY"))
    return {name: path for name, _, path in pairs}


def _refusal(error: ConfigurationError) -> typer.Exit:
    typer.echo(f"eda serve: {error}", err=True)
    return typer.Exit(2)
