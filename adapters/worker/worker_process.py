"""The worker as a process of its own: its signals, limits and its tie to the server that started it."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from eda.adapters.jobs.workspaces import Workspaces
from eda.adapters.private_files import private_directory
from eda.adapters.store.store import AdapterStore
from eda.adapters.worker.process import run_gently
from eda.adapters.worker.settings import WorkerSettings
from eda.adapters.worker.worker import StagesFactory, Worker

_GRACE_SECONDS = 6.0
"""Less than a supervisor waits before it kills."""

logger = logging.getLogger(__name__)


def run_worker(settings: WorkerSettings, make_stages: StagesFactory) -> None:
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
        make_stages,
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
