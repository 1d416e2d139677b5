"""`eda worker`: runs adaptation jobs by hand, beside or without a server on the same data directory."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.worker_main import run_training_worker
from server.adaptation import worker_settings
from server.models import model_paths
from server.settings import ConfigurationError, load_settings


def worker(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.", envvar="EDA_CONFIG")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Family of models. [bundled]")] = None,
    target: Annotated[Path | None, typer.Option(help="Base model directory.")] = None,
    draft: Annotated[Path | None, typer.Option(help="Shared draft directory.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where adapters and jobs are kept. [./var]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16. [auto]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1. [auto]")] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads. [half of the machine's]")] = None,
    memory_mib: Annotated[
        int | None, typer.Option(help="Memory at which a job is given up, MiB. [no limit]")
    ] = None,
    niceness: Annotated[int | None, typer.Option(help="0 to 19: how far to stand back. [10]")] = None,
) -> None:
    """Run adaptation jobs one after another until SIGTERM or SIGINT; `eda serve` starts one of these by itself.

    The model settings must be the server's, since a private module fits one target and one draft only.
    """
    overrides: dict[str, Any] = {
        "models_dir": models_dir,
        "target": target,
        "draft": draft,
        "data_dir": data_dir,
        "dtype": dtype,
        "device": device,
        "worker_threads": num_threads,
        "worker_memory_mib": memory_mib,
        "worker_niceness": niceness,
    }
    try:
        settings = load_settings(config, overrides)
        paths = model_paths(settings)
        if paths.draft is None:
            raise ConfigurationError("there is no shared draft to adapt: name one with --draft")
    except ConfigurationError as error:
        typer.echo(f"eda worker: {error}", err=True)
        raise typer.Exit(2) from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    run_training_worker(worker_settings(settings, paths, paths.draft, supervised=False))
