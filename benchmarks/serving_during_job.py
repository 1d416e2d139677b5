"""What users notice of an adaptation job on the same CPU, and what the job notices of them.

    python -m benchmarks.serving_during_job --rounds 5

Starts a server and, for each way of sharing the processor, a process that trains as a job does (``training_load``).
They take turns: all but one training are stopped (SIGSTOP) while something is measured, so every figure of a round is
taken within a minute. Ratios are medians over rounds of what was measured in one round.

- lone: one request after another; x4: four at a time. Streamed over HTTP, with the model's private draft.
- paced: a lone request every second, which leaves the job the time in between; tokens per second of waiting.

On a machine that others use too, a measurement during which they took more than ``--foreign`` of a core is taken
again, a few times; how much they took is printed.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from adapters.process import SLEEPING_OPENMP
from server.load import LoadRequest, read_prompts, run_load

WAYS = {
    "as anybody": ("normal", 0),
    "niceness 10": ("normal", 10),
    "niceness 19": ("normal", 19),
    "idle": ("idle", 10),
}
"""How the training shares the processor: scheduling and niceness."""
QUIET = "no job"
PACE_SECONDS = 1.0


class Training:
    """A stopped training process, which runs between ``go`` and ``halt``."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.steps = 0
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        assert self.process.stdout is not None
        for _ in self.process.stdout:
            self.steps += 1

    def warm_up(self) -> None:
        while self.steps < 3:
            if self.process.poll() is not None:
                raise SystemExit("benchmarks.serving_during_job: the training ended")
            time.sleep(0.1)
        self.halt()

    def go(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def halt(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Others:
    """Cores that processes other than ours take."""

    def __init__(self, ours: Sequence[int]) -> None:
        self._ours = [psutil.Process(pid) for pid in ours]
        self._start = self._read()

    def _read(self) -> tuple[float, float]:
        total = psutil.cpu_times()
        busy = sum(total) - total.idle - getattr(total, "iowait", 0.0) - getattr(total, "guest", 0.0)
        own = sum(sum(process.cpu_times()[:2]) for process in self._ours)
        return time.perf_counter(), busy - own

    def cores(self) -> float:
        (start, before), (end, after) = self._start, self._read()
        return max(0.0, (after - before) / (end - start))


@dataclass(frozen=True, slots=True)
class Window:
    """One measurement: tokens and training steps a second, and cores that others took."""

    tokens: float
    steps: float
    foreign: float


class Bench:
    def __init__(self, url: str, server: int, trainings: dict[str, Training], options: argparse.Namespace):
        self._url, self._trainings, self._options = url, trainings, options
        self._pids = [server, os.getpid(), *(training.process.pid for training in trainings.values())]
        self._request = LoadRequest(options.model, options.draft, options.tokens, 0.0, True, ignore_eos=True)
        self._prompts = read_prompts(options.prompts, 36)

    def window(self, kind: str, way: str) -> Window:
        """``kind`` is "lone", "x4", "paced" or "alone" (the job, with an idle server)."""
        best: Window | None = None
        for _ in range(self._options.attempts):
            found = self._once(kind, way)
            best = found if best is None or found.foreign < best.foreign else best
            if best.foreign <= self._options.foreign:
                break
        assert best is not None
        return best

    def _once(self, kind: str, way: str) -> Window:
        training = self._trainings.get(way)
        if training is not None:
            training.go()
            time.sleep(0.5)
        try:
            others, start = Others(self._pids), time.perf_counter()
            steps = training.steps if training is not None else 0
            tokens, waiting = asyncio.run(self._serve(kind))
            seconds = time.perf_counter() - start
            steps = (training.steps if training is not None else 0) - steps
            return Window(tokens / waiting if waiting else 0.0, steps / seconds, others.cores())
        finally:
            if training is not None:
                training.halt()

    async def _serve(self, kind: str) -> tuple[int, float]:
        """Requests until the window is over; the number of tokens, and the seconds in which there was a request."""
        end = time.perf_counter() + self._options.seconds
        tokens, waiting, place = 0, 0.0, 0
        concurrency = 4 if kind == "x4" else 1
        async with httpx.AsyncClient(base_url=self._url, timeout=600) as client:
            while (now := time.perf_counter()) < end:
                if kind == "alone":
                    await asyncio.sleep(end - now)
                    break
                prompts = [self._prompts[(place + n) % len(self._prompts)] for n in range(concurrency)]
                place += concurrency
                views, seconds = await run_load(client, self._request, prompts, concurrency)
                tokens += sum(view.num_tokens for view in views)
                waiting += seconds
                if kind == "paced":
                    await asyncio.sleep(max(0.0, now + PACE_SECONDS - time.perf_counter()))
        return tokens, waiting


@contextmanager
def running_server(options: argparse.Namespace, data_dir: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a server without a worker of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--data-dir", data_dir]
    command += ["--log-level", "warning"] + (["--models-dir", str(options.models)] if options.models else [])
    environment = {**os.environ, "EDA_WORKER": "false"}
    with subprocess.Popen(command, env=environment) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            while not _is_ready(url):
                if server.poll() is not None:
                    raise SystemExit("benchmarks.serving_during_job: the server did not start")
                time.sleep(0.2)
            yield url, server.pid
        finally:
            server.terminate()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


def training_command(options: argparse.Namespace, way: str) -> list[str]:
    scheduling, niceness = WAYS[way]
    command = [sys.executable, "-m", "benchmarks.training_load", "--model", options.model]
    command += ["--scheduling", scheduling, "--niceness", str(niceness), "--threads", str(options.threads)]
    return command + (["--models", str(options.models)] if options.models else [])


def report(rounds: Sequence[dict[tuple[str, str], Window]], ways: Sequence[str]) -> None:
    def median(values: Iterator[float]) -> float:
        return statistics.median(values)

    def ratio(kind: str, way: str, name: str, base: tuple[str, str]) -> float:
        return median(
            getattr(found[kind, way], name) / max(1e-9, getattr(found[base], name)) for found in rounds
        )

    print(
        "\n| | tokens/s | / no job | steps/s | / server idle | others' cores |\n|---|---:|---:|---:|---:|---:|"
    )
    for kind, way in rounds[0]:
        window = {
            name: median(getattr(found[kind, way], name) for found in rounds) for name in Window.__slots__
        }
        row = [f"{kind}, {way}", "-", "-", "-", "-", f"{window['foreign']:.2f}"]
        if kind != "alone":
            row[1] = f"{window['tokens']:.0f}"
            row[2] = f"{ratio(kind, way, 'tokens', (kind, QUIET)):.2f}"
        if way != QUIET:
            row[3] = f"{window['steps']:.2f}"
            row[4] = f"{ratio(kind, way, 'steps', ('alone', way)):.2f}"
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, help="family directory [the bundled one]")
    parser.add_argument("--model", default="math", help="fine-tune that is served and adapted to")
    parser.add_argument("--draft", default="private", choices=("private", "shared", "none"))
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts" / "math.jsonl")
    parser.add_argument(
        "--ways", nargs="+", choices=tuple(WAYS), default=["as anybody", "niceness 10", "idle"]
    )
    parser.add_argument("--threads", type=int, default=0, help="of a training [half of the machine's]")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement, at least")
    parser.add_argument("--foreign", type=float, default=0.1, help="cores that others may take")
    parser.add_argument("--attempts", type=int, default=3, help="at a measurement that others disturb")
    parser.add_argument("--out", type=Path, help="JSON lines of all measurements")
    options = parser.parse_args()
    with ExitStack() as stack:
        data_dir = stack.enter_context(tempfile.TemporaryDirectory())
        url, server = stack.enter_context(running_server(options, data_dir))
        trainings: dict[str, Training] = {}
        for way in options.ways:
            trainings[way] = Training(training_command(options, way), {**SLEEPING_OPENMP, **os.environ})
            stack.callback(trainings[way].end)
            trainings[way].warm_up()
        bench = Bench(url, server, trainings, options)
        asyncio.run(bench._serve("lone"))  # warm-up
        rounds: list[dict[tuple[str, str], Window]] = []
        for number in range(options.rounds):
            found: dict[tuple[str, str], Window] = {}
            for kind in ("lone", "x4", "paced", "alone"):
                for way in [*([] if kind == "alone" else [QUIET]), *options.ways]:
                    window = found[kind, way] = bench.window(kind, way)
                    line = {"round": number, "kind": kind, "way": way, "tokens": window.tokens}
                    line |= {"steps": window.steps, "foreign": window.foreign}
                    print(json.dumps(line), flush=True)
                    if options.out is not None:
                        with options.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
            rounds.append(found)
        report(rounds, options.ways)


if __name__ == "__main__":
    main()
