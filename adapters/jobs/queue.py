"""Adaptation jobs as the server sees them: submit, read, cancel, retry. What a worker does is in ``claims.py``.

    queued -> running -> succeeded | failed | cancelled
       ^________|  (worker stopped, died or failed with attempts left)
       ^________________ failed | cancelled, by retry

Every change is one transaction, and every state change writes an event in the same one.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from eda.adapters.database import Database, adapters, events, jobs
from eda.adapters.errors import ConflictError, QueueFullError, UnknownJobError
from eda.adapters.jobs.spec import AdaptationSpec

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
STATES: tuple[JobState, ...] = ("queued", "running", "succeeded", "failed", "cancelled")
FINAL_STATES: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
DEFAULT_MAX_ATTEMPTS = 3
DEFAULT_QUEUE_LIMIT = 16


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the table, as it was at one moment. Times are seconds since the epoch.

    Attributes:
        progress: 0 to 1 over all stages; ``eta_seconds`` is ``None`` while it cannot be told.
        error: of a failed job, or of the last failed attempt: stage, reason, attempt.
        attempts: times that a worker took it up; ``stalled_attempts`` counts those since a stage last finished.
    """

    id: str
    adapter: str
    adapter_uid: str
    state: JobState
    stage: str | None
    progress: float
    eta_seconds: float | None
    message: str
    spec: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    attempts: int
    stalled_attempts: int
    max_attempts: int
    cancel_requested: bool
    request_hash: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    updated_at: float

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job or adapter; ``id`` grows over time across all of them."""

    id: int
    type: str
    data: dict[str, Any]
    created_at: float


_JOB_COLUMNS = [jobs.c[name] for name in Job.__dataclass_fields__]


def new_job_id() -> str:
    return f"job-{uuid.uuid4().hex}"


def job_from_row(row: RowMapping) -> Job:
    return Job(**{name: row[name] for name in Job.__dataclass_fields__})


def add_event(
    connection: Connection,
    kind: str,
    data: Mapping[str, Any],
    *,
    job_id: str | None = None,
    adapter_uid: str | None = None,
) -> None:
    """Appends an event inside the caller's transaction."""
    connection.execute(
        insert(events).values(
            job_id=job_id, adapter_uid=adapter_uid, type=kind, data=dict(data), created_at=time.time()
        )
    )


class JobQueue:
    """The jobs of all adapters, oldest first.

    ``queue_limit`` bounds the jobs that wait, ``max_attempts`` the attempts in a row that finish no stage;
    ``waits_for`` is what queued jobs wait for, in words.
    """

    def __init__(
        self,
        database: Database,
        *,
        queue_limit: int = DEFAULT_QUEUE_LIMIT,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        waits_for: str = "the worker",
    ) -> None:
        self.database = database
        self.waits_for = waits_for
        self.queue_limit = queue_limit
        self.max_attempts = max_attempts

    def insert(
        self,
        connection: Connection,
        spec: AdaptationSpec,
        *,
        idempotency_key: str | None = None,
        request_hash: str = "",
    ) -> None:
        """Queues ``spec`` inside the caller's transaction.

        Raises ``QueueFullError``, or ``ConflictError`` when another request with the same key came first.
        """
        self.require_room(connection)
        now = time.time()
        values = {
            "id": spec.job_id,
            "adapter": spec.adapter,
            "adapter_uid": spec.adapter_uid,
            "state": "queued",
            "progress": 0.0,
            "message": f"waiting for {self.waits_for}",
            "spec": spec.to_json(),
            "attempts": 0,
            "stalled_attempts": 0,
            "max_attempts": self.max_attempts,
            "idempotency_key": idempotency_key,
            "request_hash": request_hash,
            "cancel_requested": False,
            "not_before": now,
            "created_at": now,
            "updated_at": now,
        }
        try:
            with connection.begin_nested():
                connection.execute(insert(jobs).values(**values))
        except IntegrityError as error:
            raise ConflictError(
                f"the idempotency key {(idempotency_key or '')[:80]!r} was used for another request; use a new one"
            ) from error
        add_event(connection, "queued", {"adapter": spec.adapter}, job_id=spec.job_id)

    def require_room(self, connection: Connection) -> None:
        """Raises ``QueueFullError`` when as many jobs wait as may."""
        waiting = connection.execute(select(func.count()).where(jobs.c.state == "queued")).scalar_one()
        if waiting >= self.queue_limit:
            raise QueueFullError(
                f"{waiting} jobs wait for the worker and the limit is {self.queue_limit}; try later"
            )

    def get(self, job_id: str) -> Job:
        """Raises ``UnknownJobError``."""
        with self.database.read() as connection:
            return _get(connection, job_id)

    def page(
        self,
        *,
        state: JobState | None = None,
        adapter: str | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[Job]:
        """Newest first, at most ``limit``; ``after`` is the id of the last job of the page before."""
        query = select(*_JOB_COLUMNS).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        if state is not None:
            query = query.where(jobs.c.state == state)
        if adapter is not None:
            query = query.where(jobs.c.adapter == adapter)
        with self.database.read() as connection:
            if after is not None:
                last = _get(connection, after)
                query = query.where(
                    (jobs.c.created_at < last.created_at)
                    | ((jobs.c.created_at == last.created_at) & (jobs.c.id < last.id))
                )
            return [job_from_row(row) for row in connection.execute(query).mappings()]

    def find_by_key(self, idempotency_key: str) -> Job | None:
        """The job that was submitted with this key."""
        query = select(*_JOB_COLUMNS).where(jobs.c.idempotency_key == idempotency_key)
        with self.database.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return job_from_row(row) if row else None

    def events_after(self, job_id: str, last_id: int = 0, *, limit: int = 500) -> list[JobEvent]:
        """Events of a job with an id over ``last_id``, oldest first."""
        query = select(events).where(events.c.job_id == job_id, events.c.id > last_id)
        return self._events(query.order_by(events.c.id).limit(limit))

    def adapter_events(self, adapter_uid: str, *, limit: int = 50) -> list[JobEvent]:
        """The last events of an adapter (activations, rollbacks, alarms), newest first."""
        query = select(events).where(events.c.adapter_uid == adapter_uid)
        return self._events(query.order_by(events.c.id.desc()).limit(limit))

    def _events(self, query: Any) -> list[JobEvent]:
        with self.database.read() as connection:
            rows = connection.execute(query).mappings().all()
        return [JobEvent(row["id"], row["type"], row["data"], row["created_at"]) for row in rows]

    def cancel(self, job_id: str) -> Job:
        """Ends a waiting job at once and asks the worker to end a running one; a second call changes nothing.

        Raises ``UnknownJobError``, or ``ConflictError`` for a job that has succeeded or failed.
        """
        with self.database.write() as connection:
            job = _get(connection, job_id)
            if job.state == "cancelled":
                return job
            if job.is_final:
                raise ConflictError(
                    f"job {job_id} has {job.state}; only a queued or running job can be cancelled"
                )
            request_cancel(connection, job)
            return _get(connection, job_id)

    def retry(self, job_id: str) -> Job:
        """Queues a failed or cancelled job again; it resumes after its last finished stage.

        Raises ``UnknownJobError``, ``ConflictError`` for a job in another state, ``QueueFullError``.
        """
        with self.database.write() as connection:
            job = _get(connection, job_id)
            if job.state not in ("failed", "cancelled"):
                raise ConflictError(
                    f"job {job_id} is {job.state}; only a failed or cancelled job can be retried"
                )
            if not is_in_service(connection, job.adapter_uid):
                raise ConflictError(
                    f"job {job_id} cannot be retried: its adapter {job.adapter!r} was deleted"
                )
            self.require_room(connection)
            now = time.time()
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id)
                .values(
                    state="queued",
                    message=f"waiting for {self.waits_for}",
                    error=None,
                    cancel_requested=False,
                    stalled_attempts=0,
                    finished_at=None,
                    eta_seconds=None,
                    not_before=now,
                    updated_at=now,
                )
            )
            add_event(connection, "queued", {"adapter": job.adapter, "retry": True}, job_id=job_id)
            return _get(connection, job_id)

    def counts(self) -> dict[str, int]:
        """Number of jobs by state, zeros included."""
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        with self.database.read() as connection:
            found = {row[0]: row[1] for row in connection.execute(query)}
        return {state: found.get(state, 0) for state in STATES}


def is_in_service(connection: Connection, adapter_uid: str) -> bool:
    """Whether the adapter that a job works for is still there, and not being deleted."""
    query = select(adapters.c.state).where(adapters.c.uid == adapter_uid)
    return connection.execute(query).scalar_one_or_none() == "serving"


def request_cancel(connection: Connection, job: Job) -> None:
    """Cancels ``job`` inside the caller's transaction; does nothing to a finished one."""
    now = time.time()
    if job.state == "queued":
        values = {"state": "cancelled", "message": "cancelled before it ran", "finished_at": now}
        add_event(connection, "cancelled", {}, job_id=job.id)
    elif job.state == "running":
        values = {"message": "cancelling"}
        if not job.cancel_requested:
            add_event(connection, "cancel_requested", {"stage": job.stage}, job_id=job.id)
    else:
        return
    connection.execute(
        update(jobs).where(jobs.c.id == job.id).values(cancel_requested=True, updated_at=now, **values)
    )


def cancel_all_of(connection: Connection, adapter_uid: str) -> None:
    """Cancels every job of an adapter inside the caller's transaction."""
    query = select(*_JOB_COLUMNS).where(
        jobs.c.adapter_uid == adapter_uid, jobs.c.state.in_(("queued", "running"))
    )
    for row in connection.execute(query).mappings().all():
        request_cancel(connection, job_from_row(row))


def _get(connection: Connection, job_id: str) -> Job:
    row = connection.execute(select(*_JOB_COLUMNS).where(jobs.c.id == job_id)).mappings().one_or_none()
    if row is None:
        raise UnknownJobError(f"there is no job {job_id[:80]!r}", param="job_id")
    return job_from_row(row)
