"""Streaming load on a server: what clients see, measured from outside."""

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from eda.formats.json_files import parse_json


class LoadError(Exception):
    """The server cannot be reached, refuses a request, or the prompts cannot be read."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What is sent, the prompt aside."""

    model: str
    draft: str
    max_tokens: int
    temperature: float
    chat: bool
    ignore_eos: bool = False

    def body(self, prompt: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "draft": self.draft,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if self.chat:
            return body | {"messages": [{"role": "user", "content": prompt}]}
        return body | {"prompt": prompt}


@dataclass(slots=True)
class ClientView:
    """One answer as its client saw it; times in seconds.

    ``gaps`` has one entry for each token after the first chunk: the time since the chunk before, shared evenly by the
    tokens of a chunk, because a speculative step sends several at once.
    """

    num_tokens: int = 0
    time_to_first_token: float = 0.0
    gaps: list[float] = field(default_factory=list)
    num_target_passes: int = 0
    num_emitted: float = 0.0


@dataclass(slots=True)
class LoadResult:
    """Everything measured for one draft mode at one concurrency."""

    concurrency: int
    draft: str
    seconds: float = 0.0
    views: list[ClientView] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(view.num_tokens for view in self.views)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance_length(self) -> float:
        """Over all passes of all requests, as the server counted them."""
        passes = sum(view.num_target_passes for view in self.views)
        return sum(view.num_emitted for view in self.views) / passes if passes else 1.0

    def percentiles(self, name: str) -> dict[str, float]:
        """Median, 90 % and 99 % in milliseconds of ``time_to_first_token`` or ``gaps``."""
        if name == "gaps":
            values = [gap for view in self.views for gap in view.gaps]
        else:
            values = [view.time_to_first_token for view in self.views]
        if not values:
            return {"p50": 0.0, "p90": 0.0, "p99": 0.0}
        found = np.percentile(np.array(values) * 1000, [50, 90, 99])
        return {
            name: round(float(value), 2) for name, value in zip(("p50", "p90", "p99"), found, strict=True)
        }

    def summary(self) -> dict[str, Any]:
        return {
            "concurrency": self.concurrency,
            "draft": self.draft,
            "num_requests": len(self.views),
            "num_tokens": self.num_tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "time_to_first_token_ms": self.percentiles("time_to_first_token"),
            "inter_token_latency_ms": self.percentiles("gaps"),
            "mean_acceptance_length": round(self.acceptance_length, 4),
        }


def read_prompts(path: Path, limit: int) -> list[str]:
    """The first ``limit`` prompts of a file with one ``{"id", "prompt"}`` a line. Raises ``LoadError``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [str(parse_json(line.encode())["prompt"]) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} cannot be read as prompts: {error!r}") from error
    if not prompts:
        raise LoadError(f"{path} has no prompts")
    return prompts[:limit]


async def run_load(
    client: httpx.AsyncClient, request: LoadRequest, prompts: Sequence[str], concurrency: int
) -> tuple[list[ClientView], float]:
    """Sends all prompts, at most ``concurrency`` at a time. Returns what clients saw, and the seconds it took."""
    waiting = iter(prompts)
    views: list[ClientView] = []

    async def worker() -> None:
        for prompt in waiting:
            views.append(await stream_once(client, request, prompt))

    start = time.perf_counter()
    tasks = [asyncio.create_task(worker()) for _ in range(min(concurrency, len(prompts)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return views, time.perf_counter() - start


async def stream_once(client: httpx.AsyncClient, request: LoadRequest, prompt: str) -> ClientView:
    """One request, streamed. Raises ``LoadError`` when it fails."""
    path = "/v1/chat/completions" if request.chat else "/v1/completions"
    view = ClientView()
    start = time.perf_counter()
    before: float | None = None
    try:
        async with client.stream("POST", path, json=request.body(prompt)) as response:
            if response.status_code != 200:
                detail = (await response.aread()).decode(errors="replace")
                raise LoadError(f"{path} answered {response.status_code}: {detail[:300]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise LoadError(f"the stream ended with an error: {chunk['error'].get('message')}")
                count = sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])
                if count:
                    now = time.perf_counter()
                    if before is None:
                        view.time_to_first_token = now - start
                    else:
                        view.gaps += [(now - before) / count] * count
                    before = now
                if chunk.get("usage"):
                    _take_totals(view, chunk)
    except httpx.HTTPError as error:
        raise LoadError(f"the server cannot be reached: {type(error).__name__}: {error}") from error
    return view


def _take_totals(view: ClientView, chunk: dict[str, Any]) -> None:
    view.num_tokens = chunk["usage"]["completion_tokens"]
    metrics = chunk.get("metrics") or {}
    view.num_target_passes = metrics.get("num_target_passes", 0)
    view.num_emitted = metrics.get("mean_acceptance_length", 1.0) * view.num_target_passes


async def measure(
    client: httpx.AsyncClient,
    requests: Sequence[LoadRequest],
    prompts: Sequence[str],
    concurrencies: Iterable[int],
    rounds: int,
) -> list[LoadResult]:
    """All draft modes at all concurrencies.

    The modes take turns, round by round and in changing order, so that a machine that gets slower or faster in the
    meantime does so for all of them. Each mode is warmed up once with one prompt.
    """
    for request in requests:
        await run_load(client, request, prompts[:1], 1)
    results: list[LoadResult] = []
    for concurrency in concurrencies:
        by_mode = {request.draft: LoadResult(concurrency, request.draft) for request in requests}
        for round_ in range(rounds):
            turn = round_ % len(requests)
            for request in [*requests[turn:], *requests[:turn]]:
                views, seconds = await run_load(client, request, prompts, concurrency)
                by_mode[request.draft].views += views
                by_mode[request.draft].seconds += seconds
        results += by_mode.values()
    return results
