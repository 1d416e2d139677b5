"""`eda bench calibrate`: which drafts pay off on this machine, by batch size."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from eda.errors import EdaError
from server.calibration import CalibrationPlan, Measurement, best_levels, calibrate_decoder
from server.commands.bench_serve import PROMPTS_DIRECTORY
from server.commands.generate import LoadedModel, load_model, prompt_ids
from server.engine.speculation import DraftCosts, SpeculationTable
from server.load import LoadError, read_prompts
from server.settings import ConfigurationError, load_settings


def calibrate(
    output: Annotated[Path, typer.Option(help="File to write, for `eda serve --calibration`.")] = Path(
        "calibration.json"
    ),
    model: Annotated[str, typer.Option(help="Served name to measure with; a typical one.")] = "base",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with id and prompt. [benchmarks/prompts/MODEL.jsonl]")
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
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [auto]")] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the model.")] = None,
) -> None:
    """Measure tokens/s of plain decoding, chains and trees at each batch size, and write the best as a table.

    Chains are measured greedy and at temperature 1, where fewer draft tokens are accepted.

    Drafting is left out at batch sizes where plain decoding is as fast.
    """
    try:
        sizes = sorted({int(part) for part in batch_sizes.split(",")})
        if not sizes or sizes[0] < 1:
            raise ConfigurationError(f"--batch-sizes is {batch_sizes!r}; it must be positive numbers")
        overrides = {"models_dir": models_dir, "device": device, "num_threads": num_threads, "dtype": dtype}
        loaded = load_model(load_settings(config, overrides), model, None)
        texts = read_prompts(prompts or _default_prompts(model), max(sizes))
    except (ConfigurationError, EdaError, LoadError, ValueError) as error:
        typer.echo(f"eda bench calibrate: {error}", err=True)
        raise typer.Exit(2) from error
    if loaded.draft is None:
        typer.echo("eda bench calibrate: there is no shared draft to measure", err=True)
        raise typer.Exit(2)
    plan = CalibrationPlan(tuple(sizes), max_tokens, max_length, repeats)
    measurements, costs = _measure(loaded, texts, plan)
    table = SpeculationTable(best_levels(measurements), costs)
    table.save(output, [measurement.as_dict() for measurement in measurements])
    _show(measurements, table)
    typer.echo(f"written to {output}; use it with: eda serve --calibration {output}")


def _measure(
    loaded: LoadedModel, texts: list[str], plan: CalibrationPlan
) -> tuple[list[Measurement], DraftCosts]:
    prompts = [prompt_ids(loaded.tokenizer, text, loaded.tokenizer.has_chat_template) for text in texts]
    return calibrate_decoder(
        loaded.target, loaded.draft, loaded.fine_tune, loaded.private, prompts, plan, report=_progress
    )


def _progress(measurement: Measurement) -> None:
    typer.echo(json.dumps(measurement.as_dict()), err=True)


def _default_prompts(model: str) -> Path:
    path = PROMPTS_DIRECTORY / f"{model}.jsonl"
    return path if path.is_file() else PROMPTS_DIRECTORY / "general.jsonl"


def _show(measurements: list[Measurement], table: SpeculationTable) -> None:
    costs = table.costs
    view = Table(
        title="chosen by batch size; fractions of a plain step: "
        f"extension {costs.extension_cost:.2f}, draft pass {costs.draft_cost:.2f}, "
        f"verified token {costs.verification_cost:.2f}"
    )
    for name in ("sequences up to", "temperature", "draft", "tokens/s", "plain", "acceptance"):
        view.add_column(name, justify="right")
    for level in table.levels:
        for temperature in sorted({m.temperature for m in measurements}):
            here = [
                m
                for m in measurements
                if (m.batch_size, m.temperature) == (level.max_batch_size, temperature)
            ]
            chosen = level.speculation(sampled=temperature > 0.0)
            best = next(m for m in here if m.speculation == chosen)
            plain = next(m for m in here if m.num_speculative_tokens == 0)
            length = best.num_speculative_tokens
            name = f"{best.mode} {length}" if length else "none"
            if best.min_probability:
                name += f", to a probability of {best.min_probability:g}"
            view.add_row(
                str(level.max_batch_size),
                f"{temperature:g}",
                name,
                f"{best.tokens_per_second:.1f}",
                f"{plain.tokens_per_second:.1f}",
                f"{best.mean_acceptance_length:.2f}",
            )
    Console().print(view)
