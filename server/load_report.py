"""Load on a running server, and a table of what its clients saw."""

import os
from typing import Any

import httpx
from rich.table import Table

from eda.server.load_generator import LoadRequest, LoadResult, measure


async def measure_server(
    url: str,
    requests: list[LoadRequest],
    prompts: list[str],
    concurrencies: list[int],
    rounds: int,
    timeout: float,
) -> list[LoadResult]:
    """``eda.server.load_generator.measure`` on the server at ``url``, with the key from ``EDA_API_KEY``."""
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


def load_table(model: str, results: list[LoadResult], reference: str) -> Table:
    """One line for each draft mode and concurrency."""
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
