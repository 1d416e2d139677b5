"""What a worker process is told, and how it travels: as JSON in the environment variable ``EDA_WORKER_SETTINGS``.

Not in its arguments, which other users can see: the database URL may hold a password.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from eda.adapters.database import Database, sqlite_url
from eda.adapters.errors import InvalidInputError
from eda.adapters.jobs.claims import DEFAULT_LEASE_SECONDS
from eda.adapters.worker.process import Scheduling
from eda.formats.weight_settings import WeightSetting

SETTINGS_VARIABLE = "EDA_WORKER_SETTINGS"
DATABASE_FILE = "eda.sqlite3"


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
        device, weights: as for the server.
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
    weights: WeightSetting = "auto"
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
