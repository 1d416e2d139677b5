"""The requests of ``adaptation_demo.sh``: watch a job's events, probe a busy server, compare draft modes.

python -m benchmarks.adaptation_requests estimate URL MODEL PROMPTS
python -m benchmarks.adaptation_requests watch < events
python -m benchmarks.adaptation_requests probe URL MODEL PROMPTS OUTPUT
python -m benchmarks.adaptation_requests compare URL MODEL PROMPTS
"""

import argparse
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from eda.adapters.worker.stage_job import AdaptationDefaults
from eda.adapters.worker.stages import STAGES, Regenerate, Triage
from eda.training.data.prompts import Prompt, read_prompts
from eda.training.data.regenerate import RegenerationConfig

MODES = ("none", "shared", "private")
PROBE_TOKENS = 16
ESTIMATE_REQUESTS = 16
ESTIMATE_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("watch").set_defaults(run=watch)
    for name, run in (("estimate", estimate), ("probe", probe), ("compare", compare)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("url")
        command.add_argument("model")
        command.add_argument("prompts", type=Path)
        if name == "probe":
            command.add_argument("output", type=Path)
        elif name == "estimate":
            command.add_argument("--training", type=json.loads, default={})
        else:
            command.add_argument("--num-prompts", type=int, default=8)
            command.add_argument("--max-tokens", type=int, default=96)
            command.add_argument("--probe", type=Path)
    arguments = parser.parse_args()
    arguments.run(arguments)


def estimate(arguments: argparse.Namespace) -> None:
    """Says how long a job will take here, from how fast this server answers some of its prompts at once."""
    prompts = read_prompts(arguments.prompts)
    sample = prompts[:ESTIMATE_REQUESTS]
    with (
        httpx.Client(base_url=arguments.url, timeout=600) as client,
        ThreadPoolExecutor(ESTIMATE_REQUESTS) as pool,
    ):
        start = time.perf_counter()
        answers = pool.map(
            lambda prompt: complete(client, arguments.model, prompt, ESTIMATE_TOKENS, "none"), sample
        )
        num_tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        rate = num_tokens / (time.perf_counter() - start)
    seconds = estimated_seconds(arguments.training, len(prompts), rate)
    print(
        f"the job will take about {max(1, round(seconds / 60))} min here; it tells more as it goes on",
        flush=True,
    )


def estimated_seconds(training: Mapping[str, Any], num_prompts: int, tokens_per_second: float) -> float:
    """Seconds of a job without triage, from its usual share of answering, when answers have their full length.

    ``tokens_per_second`` is the server's, with all threads; the worker has half of them.
    """
    defaults = AdaptationDefaults()
    held_out = training.get("held_out") or min(defaults.held_out, max(1, num_prompts // 5))
    limit = training.get("max_prompts") or defaults.max_prompts
    num_answers = min(num_prompts - held_out, limit) + held_out
    num_tokens = num_answers * (training.get("max_tokens") or RegenerationConfig().max_tokens)
    answering = num_tokens / (0.5 * tokens_per_second)
    without_triage = sum(stage.weight for stage in STAGES) - Triage.weight
    return answering * without_triage / Regenerate.weight


def watch(_: argparse.Namespace) -> None:
    """Prints a job's server-sent events as lines; exits with 1 unless the job succeeds."""
    start = time.monotonic()
    for kind, data in _events():
        if kind == "progress":
            eta = data["eta_seconds"]
            left = "" if eta is None else f", about {eta:.0f} s left"
            seconds = time.monotonic() - start
            print(f"   {data['progress']:4.0%} {data['message']}, {seconds:.0f} s gone{left}", flush=True)
        elif kind == "stage_finished":
            print(f"-- {data['stage']}: {_short(data['result'])}")
        elif kind in ("succeeded", "failed", "cancelled"):
            print(f"-- {kind}: {data.get('reason', '')}")
            sys.exit(0 if kind == "succeeded" else 1)
    sys.exit("the events ended before the job did")


def _events() -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for line in sys.stdin:
        name, _, value = line.strip().partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


def _short(result: dict[str, Any]) -> str:
    plain = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
    for side in ("before", "after"):
        if side in result:
            plain[f"acceptance length {side}"] = float(result[side]["mean_acceptance_length"])
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
    )


def probe(arguments: argparse.Namespace) -> None:
    """Sends a short request every second until it is told to stop; then writes how long they took."""
    milliseconds: list[float] = []
    with contextlib.suppress(KeyboardInterrupt), httpx.Client(base_url=arguments.url, timeout=120) as client:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        prompt = read_prompts(arguments.prompts)[0]
        while True:
            start = time.perf_counter()
            complete(client, arguments.model, prompt, PROBE_TOKENS, "shared")
            milliseconds.append(1000 * (time.perf_counter() - start))
            time.sleep(1.0)
    arguments.output.write_text(json.dumps(milliseconds), encoding="utf-8")


def compare(arguments: argparse.Namespace) -> None:
    """The same greedy requests in each draft mode, in turns."""
    prompts = read_prompts(arguments.prompts)[: arguments.num_prompts]
    figures: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    texts: dict[str, list[str]] = {mode: [] for mode in MODES}
    with httpx.Client(base_url=arguments.url, timeout=600) as client:
        version = _wait_for_version(client, arguments.model)
        complete(client, arguments.model, prompts[0], PROBE_TOKENS, "private")  # warm
        for turn, prompt in enumerate(prompts):
            for place in range(len(MODES)):
                mode = MODES[(turn + place) % len(MODES)]
                answer = complete(client, arguments.model, prompt, arguments.max_tokens, mode)
                figures[mode].append({**answer["metrics"], "tokens": answer["usage"]["completion_tokens"]})
                texts[mode].append(answer["choices"][0]["message"]["content"])
        detail = client.get(f"/adapters/{arguments.model}").raise_for_status().json()
        idle = [_timed(client, arguments.model, prompts[0]) for _ in range(5)]
    _print_table(figures, len(prompts), version)
    same = sum(len({texts[mode][place] for mode in MODES}) == 1 for place in range(len(prompts)))
    delays = [event["data"] for event in detail["events"] if event["type"] == "in_service"]
    if delays:
        print(f"\nin service {delays[0]['seconds_after_activation']:.2f} s after it was published")
    print(f"{same} of {len(prompts)} answers are the same text in all three modes")
    if arguments.probe and arguments.probe.exists():
        busy = json.loads(arguments.probe.read_text(encoding="utf-8"))
        if busy:
            print(
                f"a request for {PROBE_TOKENS} tokens took {statistics.median(busy):.0f} ms (median of {len(busy)}) "
                f"while the job ran, {statistics.median(idle):.0f} ms after it"
            )


def _print_table(figures: dict[str, list[dict[str, Any]]], num_prompts: int, version: int) -> None:
    print(f"\n{num_prompts} prompts, greedy, one at a time, adapter version {version}")
    print(f"{'draft':<10}{'tokens/s':>10}{'ratio':>8}{'acceptance length':>20}")
    plain = _rate(figures["none"])
    for mode in MODES:
        passes = sum(row["num_target_passes"] for row in figures[mode])
        length = sum(row["mean_acceptance_length"] * row["num_target_passes"] for row in figures[mode]) / max(
            passes, 1
        )
        rate = _rate(figures[mode])
        print(f"{mode:<10}{rate:>10.1f}{rate / plain:>7.2f}x{length:>20.3f}")


def _rate(rows: list[dict[str, Any]]) -> float:
    """Tokens per second over all answers together."""
    return sum(row["tokens"] for row in rows) / sum(row["tokens"] / row["tokens_per_second"] for row in rows)


def _wait_for_version(client: httpx.Client, model: str) -> int:
    """The server takes a version into service within about a second of its publication."""
    for _ in range(100):
        version = client.get(f"/v1/models/{model}").raise_for_status().json().get("adapter_version")
        if version is not None:
            return int(version)
        time.sleep(0.1)
    sys.exit(f"{model} has no active version")


def _timed(client: httpx.Client, model: str, prompt: Prompt) -> float:
    start = time.perf_counter()
    complete(client, model, prompt, PROBE_TOKENS, "shared")
    return 1000 * (time.perf_counter() - start)


def complete(client: httpx.Client, model: str, prompt: Prompt, max_tokens: int, mode: str) -> dict[str, Any]:
    """One greedy chat completion."""
    body = {
        "model": model,
        "messages": [dict(message) for message in prompt.messages],
        "max_tokens": max_tokens,
        "temperature": 0,
        "draft": mode,
    }
    response = client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        sys.exit(f"{response.status_code}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


if __name__ == "__main__":
    main()
