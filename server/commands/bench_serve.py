"""`eda bench serve`: streaming load on a running server, draft modes against each other."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, get_args

import typer

from eda.server.bundled_prompts import bundled_prompts
from eda.server.engine.draft_mode import DraftMode
from eda.server.settings import ConfigurationError

TABLE_WIDTH = 110


def bench_serve(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Served model to ask for.")] = "base",
    draft: Annotated[
        str, typer.Option(help="Draft modes, separated by commas; the first is compared with.")
    ] = ("none,shared,private"),
    concurrency: Annotated[str, typer.Option(help="Requests at a time, separated by commas.")] = "1,4,16",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with id and prompt. [bundled ones for the model's domain]")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of the file that are used.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often all prompts are sent in each mode.")] = 2,
    chat: Annotated[bool, typer.Option("--chat/--completions", help="Endpoint to use.")] = True,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Answers of full length.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte until a request fails.")] = 300.0,
    output: Annotated[Path | None, typer.Option("--json", help="File for the numbers.")] = None,
) -> None:
    """Measure tokens/s, time to first token, inter-token latency and acceptance length as clients see them.

    Draft modes are measured interleaved, and compared with the first one. The key is read from EDA_API_KEY.
    """
    from rich.console import Console

    from eda.server.load_generator import LoadError, LoadRequest, read_prompts
    from eda.server.load_report import load_table, measure_server, with_ratios

    try:
        drafts = _draft_modes(draft)
        concurrencies = _positive_numbers(concurrency)
        texts = read_prompts(prompts or bundled_prompts(model), num_prompts)
        requests = [LoadRequest(model, mode, max_tokens, temperature, chat, ignore_eos) for mode in drafts]
        results = asyncio.run(measure_server(url, requests, texts, concurrencies, rounds, timeout))
    except (ConfigurationError, LoadError) as error:
        typer.echo(f"eda bench serve: {error}", err=True)
        raise typer.Exit(1) from error
    console = Console()
    Console(width=max(console.width, TABLE_WIDTH)).print(load_table(model, results, drafts[0]))
    if output is not None:
        document = {
            "url": url,
            "model": model,
            "num_prompts": len(texts),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "rounds": rounds,
            "results": with_ratios(results, drafts[0]),
        }
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _draft_modes(text: str) -> list[str]:
    modes = [part.strip() for part in text.split(",") if part.strip()]
    if not modes or any(mode not in get_args(DraftMode) for mode in modes):
        raise ConfigurationError(
            f"--draft is {text!r}; it must be some of {', '.join(get_args(DraftMode))}, separated by commas"
        )
    return list(dict.fromkeys(modes))


def _positive_numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigurationError(
            f"--concurrency is {text!r}; it must be positive numbers, separated by commas"
        )
    return numbers
