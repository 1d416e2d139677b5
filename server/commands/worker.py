"""`eda worker`: runs adaptation jobs by hand, beside or without a server on the same data directory."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from eda.server.commands.options import options_of, with_options
from eda.server.model_paths import model_paths
from eda.server.settings import ConfigurationError, Settings, load_settings

OPTIONS = {
    "models_dir": "models_dir",
    "target": "target",
    "draft": "draft",
    "data_dir": "data_dir",
    "weights": "weights",
    "device": "device",
    "num_threads": "worker_threads",
    "memory_mib": "worker_memory_mib",
    "niceness": "worker_niceness",
}
"""Names of options -> of settings."""


@with_options(options_of(Settings, OPTIONS))
def worker(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.", envvar="EDA_CONFIG")] = None,
    **given: Any,
) -> None:
    """Run adaptation jobs one after another until SIGTERM or SIGINT; `eda serve` starts one of these by itself.

    The model settings must be the server's, since a private module fits one target and one draft only.
    """
    try:
        settings = load_settings(config, {OPTIONS[name]: value for name, value in given.items()})
        paths = model_paths(settings)
        if paths.draft is None:
            raise ConfigurationError("there is no shared draft to adapt: name one with --draft")
    except ConfigurationError as error:
        typer.echo(f"eda worker: {error}", err=True)
        raise typer.Exit(2) from error
    from eda.adapters.worker.main import run_training_worker
    from eda.server.worker_settings import worker_settings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    run_training_worker(worker_settings(settings, paths, paths.draft, supervised=False))
