"""Keeps one worker process running beside the server: a fresh one for each job, and another one when it dies.

The worker gets a pipe as standard input. When the server goes, however it goes, the system closes the pipe and the
worker stops: there is never a worker without its server.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from eda.adapters.worker.process import SLEEPING_OPENMP
from eda.adapters.worker.settings import SETTINGS_VARIABLE, WorkerSettings
from eda.server.logs import logger

_COMMAND = (sys.executable, "-m", "eda.adapters.worker.main")
_SECRETS = frozenset({"EDA_API_KEYS", "EDA_ADMIN_KEY"})
_FIRST_DELAY = 1.0
_LONGEST_DELAY = 60.0
_STABLE_SECONDS = 120.0


class WorkerSupervisor:
    """Starts the worker, again after each job, and when it dies after 1, 2, 4 ... up to 60 seconds.

    Args:
        stop_seconds: how long the worker may take to save its state when the server stops; then it is killed.
    """

    def __init__(
        self, settings: WorkerSettings, *, command: Sequence[str] = _COMMAND, stop_seconds: float = 10.0
    ) -> None:
        self._command = list(command)
        inherited = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        self._environment = {**SLEEPING_OPENMP, **inherited, SETTINGS_VARIABLE: settings.to_json()}
        self._stop_seconds = stop_seconds
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._supervise, name="worker-supervisor", daemon=True)
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """Of the worker that runs now; ``None`` between two."""
        with self._lock:
            return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the worker and returns when it is gone. Its job, if any, goes on at the next start."""
        self._stopping.set()
        with self._lock:
            process = self._process
        if process is not None:
            _end(process, self._stop_seconds)
        if self._thread.is_alive():
            self._thread.join()

    def _supervise(self) -> None:
        delay = _FIRST_DELAY
        while not self._stopping.is_set():
            started = time.monotonic()
            process = self._launch()
            if process is None:
                return
            status = process.wait()
            if process.stdin is not None:
                process.stdin.close()
            if self._stopping.is_set():
                return
            lived = time.monotonic() - started
            if status == 0 and lived > _FIRST_DELAY:
                continue  # it has finished a job
            delay = _FIRST_DELAY if lived > _STABLE_SECONDS else min(2 * delay, _LONGEST_DELAY)
            self.num_restarts += 1
            logger().warning(
                "worker died", status=status, lived_seconds=round(lived, 1), restart_in_seconds=delay
            )
            self._stopping.wait(delay)

    def _launch(self) -> "subprocess.Popen[bytes] | None":
        with self._lock:
            if self._stopping.is_set():
                return None
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.PIPE, start_new_session=True
            )
            return self._process


def _end(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
