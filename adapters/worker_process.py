"""The worker as a process of its own: its settings, signals, limits and its tie to the server that started it.

``python -m adapters.worker_process`` reads ``WorkerSettings`` as JSON from the environment variable
``EDA_WORKER_SETTINGS`` (not from its arguments, which other users can see: the database URL may hold a password).
"""

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from adapters.claims import DEFAULT_LEASE_SECONDS, Claim
from adapters.database import Database, sqlite_url
from adapters.errors import InvalidInputError
from adapters.pipeline import AdaptationStages
from adapters.private_files import private_directory
from adapters.process import Scheduling, run_gently
from adapters.store import AdapterStore
from adapters.worker import StagesFactory, Worker
from adapters.workspaces import Workspaces

SETTINGS_VARIABLE = "EDA_WORKER_SETTINGS"
DATABASE_FILE = "eda.sqlite3"
_GRACE_SECONDS = 6.0
"""Less than a supervisor waits before it kills."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker needs to know; plain values, so that they travel as JSON.

    Attributes:
        data_dir: holds ``adapters/`` (the store), ``jobs/`` (workspaces) and, by default, the database.
        database_url: empty for SQLite in ``data_dir``.
        target, draft: model directories.
        bundled_adapters: read-only store directories beside the one in ``data_dir``.
        num_threads: processor threads for computing; ``None`` takes half of the machine's, at least one.
        niceness: 0 to 19; how far the worker stands back behind other processes.
        scheduling: "batch" and "normal" take the share that ``niceness`` leaves them, "batch" without ever displacing
            what runs; "idle" takes only time that nothing else wants, so on a busy machine a job stands still.
        memory_limit_mib: resident memory at which an attempt is given up; ``None`` for no limit.
        device, dtype: as for the server.
        supervised: end when standard input is closed, which the system does when the parent dies, and after each job,
            so that its memory goes back to the system; the parent starts the next worker.
    """

    data_dir: str
    target: str
    draft: str
    database_url: str = ""
    bundled_adapters: tuple[str, ...] = ()
    num_threads: int | None = None
    niceness: int = 10
    scheduling: Scheduling = "batch"
    memory_limit_mib: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    lease_seconds: float = DEFAULT_LEASE_SECONDS
    poll_seconds: float = 1.0
    supervised: bool = False

    def open_database(self) -> Database:
        return Database(self.database_url or sqlite_url(Path(self.data_dir) / DATABASE_FILE))

    @property
    def store_directory(self) -> Path:
        return Path(self.data_dir) / "adapters"

    @property
    def jobs_directory(self) -> Path:
        return Path(self.data_dir) / "jobs"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Raises ``InvalidInputError`` when the variable is missing or malformed."""
        try:
            document = json.loads(environment[SETTINGS_VARIABLE])
            bundled = tuple(document.pop("bundled_adapters", ()))
            return cls(**document, bundled_adapters=bundled)
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidInputError(
                f"{SETTINGS_VARIABLE} must hold worker settings as JSON: {error!r}"
            ) from error


def run_worker(settings: WorkerSettings, make_stages: StagesFactory | None = None) -> None:
    """Works in this process until SIGTERM, SIGINT or, when ``supervised``, the end of standard input.

    A stop lets the current stage save what it has and gives the job back. One that takes longer than 6 s is cut off,
    which loses no finished work either.
    """
    run_gently(settings.niceness, settings.scheduling)
    private_directory(Path(settings.data_dir))
    AdapterStore(settings.store_directory).clean()  # what a killed worker was writing
    database = settings.open_database()
    worker = Worker(
        database,
        Workspaces(settings.jobs_directory),
        make_stages or _real_stages(settings),
        lease_seconds=settings.lease_seconds,
        poll_seconds=settings.poll_seconds,
        memory_limit_mib=settings.memory_limit_mib,
    )

    def stop(*_: object) -> None:
        worker.stop()
        cut_off = threading.Timer(_GRACE_SECONDS, _cut_off, args=(worker,))
        cut_off.daemon = True
        cut_off.start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if settings.supervised:
        threading.Thread(target=_stop_at_end_of_input, args=(stop,), name="parent-watch", daemon=True).start()
    logger.info("worker %d waits for jobs", os.getpid())
    try:
        worker.run(one_job=settings.supervised)
    finally:
        database.close()


def _cut_off(worker: Worker) -> None:
    try:
        worker.abandon()
    finally:
        os._exit(1)


def _stop_at_end_of_input(stop: Callable[[], None]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop()


def _real_stages(settings: WorkerSettings) -> StagesFactory:
    def make(claim: Claim) -> AdaptationStages:
        from adapters.stages import (
            TrainingStages,
        )  # torch comes with it: seconds and memory, only when needed

        return TrainingStages.for_claim(settings, claim)

    return make


def main(environment: Mapping[str, str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    run_worker(WorkerSettings.from_environment(environment))


if __name__ == "__main__":
    main(os.environ)
