"""A thread of the server that keeps the registry in step with the catalog and acts on what the guard finds."""

import logging
import threading

from eda.adapters.database import UNAVAILABLE
from eda.adapters.serving.registry import AdapterRegistry

logger = logging.getLogger(__name__)


class RegistryWatcher:
    """Polls every ``poll_seconds``. A version that a worker published is in service that soon, plus loading time."""

    def __init__(self, registry: AdapterRegistry, *, poll_seconds: float = 1.0) -> None:
        self._registry = registry
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registry-watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended; safe to call without ``start``."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def poll(self) -> None:
        """One round, in the caller's thread."""
        self._registry.sync()
        for verdict in self._registry.guard.verdicts(self._registry.active_versions()):
            self._registry.apply(verdict)

    def _run(self) -> None:
        is_away = False
        while not self._stopping.wait(self._poll_seconds):
            try:
                self.poll()
                is_away = False
            except UNAVAILABLE as error:
                # That must not end the watch, nor fill the log.
                if not is_away:
                    logger.warning("the database does not answer, versions stay as they are: %s", error.orig)
                is_away = True
            except Exception:
                logger.exception("the registry could not be brought up to date")
