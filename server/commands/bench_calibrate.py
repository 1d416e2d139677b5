"""`eda bench calibrate`: which drafts pay off on this machine, by batch size."""

import json
from pathlib import Path
from typing import Annotated

import typer

from eda.errors import EdaError
from eda.server.bundled_prompts import bundled_prompts
from eda.server.commands.options import Weights
from eda.server.settings import ConfigurationError, load_settings


def calibrate(
    output: Annotated[Path, typer.Option(help="File to write, for `eda serve --calibration`.")] = Path(
        "calibration.json"
    ),
    model: Annotated[str, typer.Option(help="Served name to measure with; a typical one.")] = "base",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with id and prompt. [bundled ones for the model's domain]")
    ] = None,
    batch_sizes: Annotated[
        str, typer.Option(help="Sequences at a time, separated by commas.")
    ] = "1,2,4,8,16,32",
    max_tokens: Annotated[
        int, typer.Option(min=8, help="Tokens generated per sequence and measurement.")
    ] = 48,
    max_length: Annotated[int, typer.Option(min=1, max=16, help="Longest chain that is tried.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each setting; the median counts.")] = 3,
    models_dir: Annotated[Path | None, typer.Option(help="Family of models. [bundled]")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of the server.", envvar="EDA_CONFIG")] = None,
    weights: Weights = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [auto]")] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the model.")] = None,
) -> None:
    """Measure tokens/s of plain decoding, chains and trees at each batch size, and write the best as a table.

    Chains are measured greedy and at temperature 1, where fewer draft tokens are accepted.

    Drafting is left out at batch sizes where plain decoding is as fast.
    """
    from rich.console import Console

    from eda.server.calibration import (
        CalibrationPlan,
        Measurement,
        best_levels,
        calibrate_decoder,
        calibration_view,
    )
    from eda.server.engine.speculation import SpeculationTable
    from eda.server.load_generator import LoadError, read_prompts
    from eda.server.single_model import load_model, prompt_ids

    def report(measurement: Measurement) -> None:
        typer.echo(json.dumps(measurement.as_dict()), err=True)

    try:
        sizes = sorted({int(part) for part in batch_sizes.split(",")})
        if not sizes or sizes[0] < 1:
            raise ConfigurationError(f"--batch-sizes is {batch_sizes!r}; it must be positive numbers")
        overrides = {
            "models_dir": models_dir,
            "device": device,
            "num_threads": num_threads,
            "weights": weights,
        }
        loaded = load_model(load_settings(config, overrides), model, None)
        texts = read_prompts(prompts or bundled_prompts(model), max(sizes))
    except (ConfigurationError, EdaError, LoadError, ValueError) as error:
        typer.echo(f"eda bench calibrate: {error}", err=True)
        raise typer.Exit(2) from error
    if loaded.draft is None:
        typer.echo("eda bench calibrate: there is no shared draft to measure", err=True)
        raise typer.Exit(2)
    plan = CalibrationPlan(tuple(sizes), max_tokens, max_length, repeats)
    measurements, costs = calibrate_decoder(
        loaded.target,
        loaded.draft,
        loaded.fine_tune,
        loaded.private,
        [prompt_ids(loaded.tokenizer, text, loaded.tokenizer.has_chat_template) for text in texts],
        plan,
        report=report,
    )
    table = SpeculationTable(best_levels(measurements), costs)
    table.save(output, [measurement.as_dict() for measurement in measurements])
    Console().print(calibration_view(measurements, table))
    typer.echo(f"written to {output}; use it with: eda serve --calibration {output}")
