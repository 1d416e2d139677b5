"""Tables and transactions, in SQLite or PostgreSQL.

The database says which fine-tunes are registered, which version of each is active, and what every job is doing; the
store holds the files. Times are seconds since the epoch.

Writers take turns on both: what a write transaction reads stays true until it commits, and events become visible in
the order of their ids. That costs nothing here, where a busy day has a write or two a second.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy.exc
from sqlalchemy import (
    JSON,
    URL,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
)

from eda.adapters.errors import InvalidInputError
from eda.adapters.private_files import private_file
from eda.adapters.store.files import locked

BUSY_TIMEOUT_MS = 30_000
UNAVAILABLE = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)
"""What transactions raise while the database is away, locked or out of room; the same call may succeed later."""
_POSTGRES_LOCK = 0x6564615F6462  # "eda_db"

metadata = MetaData()

adapters = Table(
    "adapters",
    metadata,
    Column("uid", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("folded_name", String(64), nullable=False, unique=True),
    Column("origin", String(16), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("path", Text, nullable=False),
    Column("fine_tune_fingerprint", String(256), nullable=False),
    Column("state", String(16), nullable=False),
    Column("description", Text, nullable=False),
    Column("limits", JSON, nullable=False),
    Column("record_traffic", Boolean, nullable=False),
    Column("active_version", Integer, nullable=True),
    Column("rejected_versions", JSON, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(48), primary_key=True),
    Column("adapter", String(64), nullable=False),
    Column("adapter_uid", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("stage", String(16), nullable=True),
    Column("progress", Float, nullable=False),
    Column("eta_seconds", Float, nullable=True),
    Column("message", Text, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("result", JSON, nullable=True),
    Column("error", JSON, nullable=True),
    Column("attempts", Integer, nullable=False),
    Column("stalled_attempts", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("idempotency_key", String(255), nullable=True, unique=True),
    Column("request_hash", String(64), nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("not_before", Float, nullable=False),
    Column("claim", String(32), nullable=True),
    Column("worker", Text, nullable=True),
    Column("lease_expires_at", Float, nullable=True),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float, nullable=True),
    Column("finished_at", Float, nullable=True),
    Column("updated_at", Float, nullable=False),
    Index("jobs_by_state", "state", "created_at"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("job_id", String(48), ForeignKey("jobs.id"), nullable=True, index=True),
    Column("adapter_uid", String(32), nullable=True, index=True),
    Column("type", String(32), nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    sqlite_autoincrement=True,
)


class Database:
    """Short transactions over one connection pool; safe to use from several threads and processes.

    Raises ``InvalidInputError`` for a URL of another kind of database, or without its driver.
    """

    def __init__(self, url: str) -> None:
        self.engine = _create_engine(url)
        try:
            with _creating(self.engine), self.write() as connection:
                metadata.create_all(connection)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view. Readers neither wait for writers nor hold them up."""
        with _refusing_values(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; all of it happens or none.

        It takes the only write lock at its start, so what it reads stays true until it commits.
        """
        with (
            _refusing_values(),
            self.engine.connect().execution_options(eda_write=True) as connection,
            connection.begin(),
        ):
            yield connection

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def _refusing_values() -> Iterator[None]:
    """PostgreSQL refuses some values that SQLite takes, such as texts with a NUL: whoever gave one is told."""
    try:
        yield
    except sqlalchemy.exc.DataError as error:
        raise InvalidInputError(f"a value cannot be kept in the database: {error.orig}") from error


def _to_json(value: Any) -> str:
    """JSON that every reader takes: numbers that are not finite become null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file."""
    return f"sqlite:///{path.resolve()}"


def _create_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except sqlalchemy.exc.ArgumentError:
        # Its own message would show a password.
        raise InvalidInputError(
            "the database URL cannot be read; it must look like sqlite:////path"
        ) from None
    if parsed.get_backend_name() == "postgresql":
        return _create_postgres(parsed)
    if parsed.get_backend_name() != "sqlite":
        raise InvalidInputError(
            f"the database URL is for {parsed.get_backend_name()}; it must begin with sqlite: or postgresql:"
        )
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}, json_serializer=_to_json)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _create_postgres(url: URL) -> Engine:
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    try:
        engine = create_engine(url, pool_pre_ping=True, json_serializer=_to_json)
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise InvalidInputError(
            f"the database URL needs a driver that is not installed ({error}); install eda-server[postgres]"
        ) from error
    event.listen(engine, "connect", _configure_postgres)
    event.listen(engine, "begin", _begin_postgres)
    return engine


@contextmanager
def _creating(engine: Engine) -> Iterator[None]:
    """Keeps two processes that start together from setting up one SQLite file at the same time."""
    path = engine.url.database
    if engine.dialect.name != "sqlite" or not path or path == ":memory:":
        yield
        return
    file = Path(path)
    with locked(file.with_name(f".{file.name}.lock")):
        # SQLite gives its other files the mode of the first one.
        private_file(file)
        for suffix in ("-wal", "-shm"):
            if (other := file.with_name(file.name + suffix)).exists():
                private_file(other)
        yield


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own transaction control would begin late and lock late; _begin_sqlite does it instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # NORMAL may lose the last commits when the power fails
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("eda_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _configure_postgres(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET lock_timeout = {BUSY_TIMEOUT_MS}")
    # A process that stops or loses its network inside a transaction must not hold the write lock for ever.
    cursor.execute(f"SET idle_in_transaction_session_timeout = {BUSY_TIMEOUT_MS}")
    cursor.close()
    connection.commit()


def _begin_postgres(connection: Connection) -> None:
    if connection.get_execution_options().get("eda_write", False):
        # Read committed: every statement after the lock sees what the writer before has committed.
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
