"""What the tests of jobs, workers and registries share."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from eda.adapters.database import Database
from eda.adapters.jobs.claims import Claim
from eda.adapters.jobs.queue import Job, JobQueue, new_job_id
from eda.adapters.jobs.spec import AdaptationSpec, DataSpec
from eda.adapters.jobs.workspaces import Workspaces
from eda.adapters.serving.catalog import Catalog, CatalogEntry, new_entry
from eda.adapters.store.store import AdapterStore
from eda.adapters.worker.settings import WorkerSettings
from eda.adapters.worker.worker import Worker
from tests.adapters.databases import url_of
from tests.adapters.fake_stages import FakeWork, fake_stages, work

FAKE_WORKER = Path(__file__).with_name("fake_stages.py")


def warm_processes() -> ForkServerContext:
    """Starts processes by forking one that has imported what is slow to import; the first call in a run counts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.adapters.test_service", "tests.adapters.test_real_kills"])
    return context


class Service:
    """The parts below HTTP over one data directory, with a fine-tune that exists by name only."""

    def __init__(
        self, data_dir: Path, database: Database, *, max_attempts: int = 3, queue_limit: int = 16
    ) -> None:
        self.data_dir = data_dir
        self.database = database
        self.catalog = Catalog(database)
        self.store = AdapterStore(data_dir / "adapters")
        self.workspaces = Workspaces(data_dir / "jobs")
        self.queue = JobQueue(database, queue_limit=queue_limit, max_attempts=max_attempts)

    def register(self, name: str) -> CatalogEntry:
        entry = new_entry(name, "posted", "lora", "/x", "tune")
        with self.database.write() as connection:
            self.catalog.insert_in(connection, entry)
        return entry

    def submit(self, name: str, **changes: Any) -> Job:
        """Queues a job for ``name``, which is registered first if it is not."""
        entry = next((entry for entry in self.catalog.all() if entry.name == name), None) or self.register(
            name
        )
        spec = AdaptationSpec(
            job_id=new_job_id(),
            adapter=name,
            adapter_uid=entry.uid,
            kind="lora",
            fine_tune_path="/x",
            fine_tune_fingerprint="tune",
            data=DataSpec("self", 8),
            incumbent_version=entry.active_version,
            **changes,
        )
        with self.database.write() as connection:
            self.queue.insert(connection, spec)
        return self.queue.get(spec.job_id)

    def worker(self, make: Callable[[Claim], Any] | None = None, **options: Any) -> Worker:
        make = make or (lambda claim: fake_stages(FakeWork(self.store, claim, steps=2, step_seconds=0.0)))
        options = {"lease_seconds": 5.0, "poll_seconds": 0.02} | options
        return Worker(self.database, self.workspaces, make, **options)

    def start_worker(self, *, step_seconds: float = 0.02) -> BaseProcess:
        """A worker process with fake stages, forked from one that has everything imported."""
        settings = WorkerSettings(
            data_dir=str(self.data_dir),
            target="",
            draft="",
            database_url=url_of(self.database),
            lease_seconds=5.0,
            poll_seconds=0.05,
            niceness=0,
        )
        process = warm_processes().Process(target=work, args=(settings, step_seconds))
        process.start()
        return process

    def event_types(self, job_id: str) -> list[str]:
        return [event.type for event in self.queue.events_after(job_id)]


def wait_for(condition: Callable[[], Any], timeout: float = 20.0, what: str = "the condition") -> Any:
    """Polls until ``condition`` gives something true, which is returned."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what} did not hold within {timeout} s")


def stop(process: BaseProcess) -> None:
    """Ends a process that a test started."""
    process.terminate()
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()
