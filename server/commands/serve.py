"""`eda serve`: the server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eda.server.commands.options import options_of, with_options
from eda.server.model_paths import check_models, model_paths
from eda.server.settings import ConfigurationError, Settings, load_settings

if TYPE_CHECKING:  # they import torch, which takes seconds: files are checked first
    pass

PATH = "Paths"
ENGINE = "Engine"
ENGINE_SETTINGS = (
    "weights",
    "device",
    "num_threads",
    "cache_mib",
    "max_model_len",
    "max_running",
    "max_waiting",
    "max_tokens_per_step",
    "calibration",
)


@with_options(
    options_of(Settings, ("host", "port", "request_timeout", "drain_seconds", "log_format", "log_level")),
    options_of(Settings, ("models_dir", "target", "draft", "no_draft", "data_dir"), panel=PATH),
    options_of(Settings, ENGINE_SETTINGS, panel=ENGINE),
)
def serve(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.", envvar="EDA_CONFIG")] = None,
    fine_tune: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DIRECTORY; may be repeated. [the others in models_dir]", rich_help_panel=PATH
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective settings and end.")
    ] = False,
    **settings_given: Any,
) -> None:
    """Serve models over HTTP. Every setting can also be given as `EDA_<NAME>` or in the TOML file.

    Without flags: the bundled family on 127.0.0.1:8000, data in ./var. Keys come from EDA_API_KEYS,
    EDA_API_KEYS_FILE, EDA_ADMIN_KEY and EDA_ADMIN_KEY_FILE; without an administration key only loopback addresses are
    allowed.
    """
    try:
        settings = load_settings(config, {**settings_given, "fine_tunes": _fine_tunes(fine_tune)})
    except ConfigurationError as error:
        raise _refusal(error) from error
    if print_config:
        typer.echo(json.dumps(settings.printable(), indent=2))
        return
    try:
        check_models(model_paths(settings))  # what is wrong is told before anything is started
    except ConfigurationError as error:
        raise _refusal(error) from error
    from eda.server.graceful_server import run
    from eda.server.logs import configure_logs

    configure_logs(settings)
    raise typer.Exit(run(settings))


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
