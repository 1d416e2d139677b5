"""`eda bench serve`: streaming load on a running server, draft modes against each other."""

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from server.load import LoadError, LoadRequest, LoadResult, measure, read_prompts

PROMPTS_DIRECTORY = Path("benchmarks/prompts")
TABLE_WIDTH = 110
DRAFTS = ("none", "shared", "private")


def bench_serve(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Served model to ask for.")] = "base",
    draft: Annotated[
        str, typer.Option(help="Draft modes, separated by commas; the first is compared with.")
    ] = ("none,shared,private"),
    concurrency: Annotated[str, typer.Option(help="Requests at a time, separated by commas.")] = "1,4,16",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with id and prompt. [benchmarks/prompts/MODEL.jsonl]")
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
    try:
        drafts = _draft_modes(draft)
        concurrencies = _positive_numbers(concurrency)
        texts = read_prompts(prompts or PROMPTS_DIRECTORY / f"{_prompt_set(model)}.jsonl", num_prompts)
        requests = [LoadRequest(model, mode, max_tokens, temperature, chat, ignore_eos) for mode in drafts]
        results = asyncio.run(_run(url, requests, texts, concurrencies, rounds, timeout))
    except LoadError as error:
        typer.echo(f"eda bench serve: {error}", err=True)
        raise typer.Exit(1) from error
    console = Console()
    Console(width=max(console.width, TABLE_WIDTH)).print(_table(model, results, drafts[0]))
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


async def _run(
    url: str,
    requests: list[LoadRequest],
    prompts: list[str],
    concurrencies: list[int],
    rounds: int,
    timeout: float,
) -> list[LoadResult]:
    key = os.environ.get("EDA_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits) as client:
        return await measure(client, requests, prompts, concurrencies, rounds)


def with_ratios(results: list[LoadResult], reference: str) -> list[dict[str, Any]]:
    """Summaries, each with its tokens/s over those of ``reference`` at the same concurrency."""
    rates = {result.concurrency: result.tokens_per_second for result in results if result.draft == reference}
    summaries = []
    for result in results:
        rate = rates.get(result.concurrency)
        ratio = round(result.tokens_per_second / rate, 3) if rate else None
        summaries.append({**result.summary(), f"speedup_over_{reference}": ratio})
    return summaries


def _table(model: str, results: list[LoadResult], reference: str) -> Table:
    table = Table(title=f"{model}: latencies in ms, median / 90 % / 99 %")
    for name in (
        "concurrency",
        "draft",
        "tokens/s",
        f"vs {reference}",
        "first token",
        "inter-token",
        "acceptance",
    ):
        table.add_column(name, justify="left" if name == "draft" else "right")
    for row in with_ratios(results, reference):
        ratio = row[f"speedup_over_{reference}"]
        table.add_row(
            str(row["concurrency"]),
            row["draft"],
            f"{row['tokens_per_second']:.1f}",
            "-" if ratio is None else f"{ratio:.2f}x",
            _latencies(row["time_to_first_token_ms"]),
            _latencies(row["inter_token_latency_ms"]),
            f"{row['mean_acceptance_length']:.2f}",
        )
    return table


def _latencies(values: dict[str, float]) -> str:
    return " / ".join(f"{values[name]:.0f}" for name in ("p50", "p90", "p99"))


def _prompt_set(model: str) -> str:
    """The base model is measured on general prompts."""
    return model if (PROMPTS_DIRECTORY / f"{model}.jsonl").is_file() else "general"


def _draft_modes(text: str) -> list[str]:
    modes = [part.strip() for part in text.split(",") if part.strip()]
    if not modes or any(mode not in DRAFTS for mode in modes):
        raise LoadError(f"--draft is {text!r}; it must be some of {', '.join(DRAFTS)}, separated by commas")
    return list(dict.fromkeys(modes))


def _positive_numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise LoadError(f"--concurrency is {text!r}; it must be positive numbers, separated by commas")
    return numbers
