"""What users notice of an adaptation job on the same CPU, and what the job notices of them.

    python -m benchmarks.serving_during_job --rounds 5

Starts a server and, for each way of sharing the processor, a process that trains as a job does (``training_load``).
They take turns: all but one training are stopped (SIGSTOP) while something is measured, so every figure of a round is
taken within a minute or two.

- lone: one request after another; x4: four at a time. Streamed over HTTP, with the model's private draft.
- paced: a lone request every second, which leaves the job the time in between; tokens per second of waiting.

On a machine that others use too, it waits for up to ``--patience`` seconds before each measurement until they take
less than ``--foreign`` of a core, and figures are medians of the measurements that they left undisturbed.
``--baseline`` names another checkout of this project, whose server is measured in turn with this one's.
"""

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from eda.adapters.worker.process import SLEEPING_OPENMP
from eda.server.bundled_prompts import bundled_prompts
from eda.server.load_generator import LoadRequest, read_prompts, run_load

WAYS = {
    "as anybody": ("normal", 0),
    "niceness 10": ("normal", 10),
    "batch 10": ("batch", 10),
    "batch 19": ("batch", 19),
    "idle": ("idle", 10),
}
"""How the training shares the processor: scheduling and niceness."""
QUIET = "no job"
HERE = "ours"
Key = tuple[str, str, str]
"""Server, kind of load, way of training."""
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
        while self.steps < 2:  # it stands back from then on
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
    def __init__(
        self,
        servers: dict[str, tuple[str, int]],
        trainings: dict[str, Training],
        options: argparse.Namespace,
    ) -> None:
        self._servers, self._trainings, self._options = servers, trainings, options
        self._pids = [os.getpid(), *(pid for _, pid in servers.values())]
        self._pids += [training.process.pid for training in trainings.values()]
        self._request = LoadRequest(options.model, options.draft, options.tokens, 0.0, True, ignore_eos=True)
        self._prompts = read_prompts(options.prompts, 36)

    def window(self, server: str, kind: str, way: str) -> Window:
        """``kind`` is "lone", "x4", "paced" or "alone" (the job, with an idle server)."""
        self._wait_for_quiet()
        training = self._trainings.get(way)
        if training is not None:
            training.go()
            time.sleep(0.5)
        try:
            others, start = Others(self._pids), time.perf_counter()
            steps = training.steps if training is not None else 0
            tokens, waiting = asyncio.run(self._serve(self._servers[server][0], kind))
            seconds = time.perf_counter() - start
            steps = (training.steps if training is not None else 0) - steps
            return Window(tokens / waiting if waiting else 0.0, steps / seconds, others.cores())
        finally:
            if training is not None:
                training.halt()

    def _wait_for_quiet(self) -> None:
        end = time.monotonic() + self._options.patience
        while time.monotonic() < end:
            others = Others(self._pids)
            time.sleep(1.0)
            if others.cores() <= self._options.foreign:
                return

    async def _serve(self, url: str, kind: str) -> tuple[int, float]:
        """Requests until the window is over; the number of tokens, and the seconds in which there was a request."""
        end = time.perf_counter() + self._options.seconds
        tokens, waiting, place = 0, 0.0, 0
        concurrency = 4 if kind == "x4" else 1
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
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
def running_server(options: argparse.Namespace, checkout: Path, data_dir: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a server without a worker of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "eda.server", "serve", "--port", str(port), "--data-dir", data_dir]
    command += ["--log-level", "warning", "--cache-mib", "64"]
    command += ["--models-dir", str(options.models)] if options.models else []
    environment = {**os.environ, "EDA_WORKER": "false", "PYTHONPATH": str(checkout)}
    with subprocess.Popen(command, env=environment, cwd=checkout) as server:
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


def report(windows: Mapping[Key, Sequence[Window]], foreign: float) -> None:
    """A table of medians over undisturbed windows, and what part they are of the same without a job."""
    clean = {key: [w for w in found if w.foreign <= foreign] or found for key, found in windows.items()}

    def median(key: Key, name: str) -> float:
        return statistics.median([getattr(window, name) for window in clean[key]] or [0.0])

    def share(key: Key, name: str, whole: Key) -> str:
        return f"{median(key, name) / median(whole, name):.2f}" if median(whole, name) else "-"

    print("\n| | tokens/s | / no job | steps/s | / server idle | windows | others |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for key, found in clean.items():
        server, kind, way = key
        tokens = steps = ["-", "-"]
        if kind != "alone":
            tokens = [f"{median(key, 'tokens'):.0f}", share(key, "tokens", (server, kind, QUIET))]
        if way != QUIET:
            steps = [f"{median(key, 'steps'):.2f}", share(key, "steps", (HERE, "alone", way))]
        row = [", ".join(key), *tokens, *steps, f"{len(found)} of {len(windows[key])}"]
        print(f"| {' | '.join(row)} | {median(key, 'foreign'):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, help="family directory [the bundled one]")
    parser.add_argument("--model", default="math", help="fine-tune that is served and adapted to")
    parser.add_argument("--draft", default="private", choices=("private", "shared", "none"))
    parser.add_argument("--prompts", type=Path, default=bundled_prompts("math"))
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=["as anybody", "batch 10", "idle"])
    parser.add_argument("--threads", type=int, default=0, help="of a training [half of the machine's]")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement, at least")
    parser.add_argument("--foreign", type=float, default=0.1, help="cores that others may take")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for that")
    parser.add_argument("--baseline", type=Path, help="another checkout, whose server is measured too")
    options = parser.parse_args()
    with ExitStack() as stack:
        checkouts = {HERE: Path(__file__).resolve().parent.parent}
        if options.baseline is not None:
            checkouts["baseline"] = options.baseline.resolve()
        servers: dict[str, tuple[str, int]] = {}
        for name, checkout in checkouts.items():
            data_dir = stack.enter_context(tempfile.TemporaryDirectory())
            servers[name] = stack.enter_context(running_server(options, checkout, data_dir))
        trainings: dict[str, Training] = {}
        for way in options.ways:
            trainings[way] = Training(training_command(options, way), {**SLEEPING_OPENMP, **os.environ})
            stack.callback(trainings[way].end)
            trainings[way].warm_up()
        bench = Bench(servers, trainings, options)
        keys = [
            (server, kind, way)
            for kind in ("lone", "x4", "paced")
            for way in (QUIET, *options.ways)
            for server in servers
        ] + [(HERE, "alone", way) for way in options.ways]
        windows: dict[Key, list[Window]] = {key: [] for key in keys}
        for server in servers:
            bench.window(server, "lone", QUIET)  # warm-up
        try:
            for _ in range(options.rounds):
                for key in keys:
                    window = bench.window(*key)
                    windows[key].append(window)
                    values = f"{window.tokens:8.0f} tokens/s {window.steps:6.2f} steps/s"
                    print(f"{', '.join(key):32} {values}, others {window.foreign:.2f}", flush=True)
        except KeyboardInterrupt:
            print("interrupted")
        report(windows, options.foreign)


if __name__ == "__main__":
    main()
