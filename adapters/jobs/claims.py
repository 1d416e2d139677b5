"""A worker's side of the job table: take a job, keep it alive, report, end it.

A claim is a random token in the job's row. Every write names the token, so a worker that was taken for dead and was not
finds that its writes change nothing (``ClaimLostError``) and stops. A claim lasts ``lease_seconds`` after its last
heartbeat, or less where the worker's process is known to be gone.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, or_, select, update

from eda.adapters.database import Database, jobs
from eda.adapters.errors import (
    ClaimLostError,
    ConflictError,
    InvalidInputError,
    JobInterruptedError,
    UnknownModelError,
)
from eda.adapters.jobs.queue import Job, add_event, is_in_service, job_from_row
from eda.adapters.jobs.spec import AdaptationSpec
from eda.adapters.serving.catalog import Catalog
from eda.adapters.worker.process import is_certainly_dead

DEFAULT_LEASE_SECONDS = 60.0
_LONGEST_RETRY_DELAY = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished job leaves: a result for its row and, perhaps, a version to activate."""

    result: dict[str, Any]
    activate_version: int | None = None


class Claim:
    """One job, owned by this worker until it is ended, released or lost. Safe to use from several threads."""

    def __init__(
        self, database: Database, job: Job, spec: AdaptationSpec, token: str, lease_seconds: float
    ) -> None:
        self.job = job
        self.spec = spec
        self._database = database
        self._token = token
        self._lease_seconds = lease_seconds

    def heartbeat(self) -> bool:
        """Prolongs the lease; tells whether the job is to be cancelled. Raises ``ClaimLostError``."""
        with self._database.write() as connection:
            self._update(connection, lease_expires_at=time.time() + self._lease_seconds)
            query = select(jobs.c.cancel_requested).where(jobs.c.id == self.job.id)
            return bool(connection.execute(query).scalar_one())

    def require_permission_to_publish(self) -> None:
        """Raises unless publishing is right.

        ``ClaimLostError`` when another worker has the job, ``JobInterruptedError`` when it was cancelled,
        ``ConflictError`` when its adapter is gone.
        """
        with self._database.read() as connection:
            query = select(jobs.c.claim, jobs.c.cancel_requested).where(jobs.c.id == self.job.id)
            row = connection.execute(query).one_or_none()
            if row is None or row.claim != self._token:
                raise self._lost()
            if row.cancel_requested:
                raise JobInterruptedError(f"job {self.job.id} was cancelled before its version was published")
            self._require_adapter(connection)

    def progress(self, stage: str, fraction: float, eta_seconds: float | None, message: str) -> None:
        """Shows where the job stands: ``fraction`` is 0 to 1 over all stages."""
        with self._database.write() as connection:
            self._update(
                connection,
                stage=stage,
                progress=min(max(fraction, 0.0), 1.0),
                eta_seconds=eta_seconds,
                message=message[:500],
                lease_expires_at=time.time() + self._lease_seconds,
            )

    def event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Appends an event (a loss, an acceptance length, the end of a stage)."""
        with self._database.write() as connection:
            self._update(connection)
            add_event(connection, kind, data, job_id=self.job.id)

    def stage_finished(self, stage: str, data: Mapping[str, Any]) -> None:
        """Records that ``stage`` is done for good; attempts count anew from here."""
        with self._database.write() as connection:
            self._update(connection, stage=stage, stalled_attempts=1)
            add_event(connection, "stage_finished", {"stage": stage, **data}, job_id=self.job.id)

    def succeed(self, outcome: Outcome) -> None:
        """Ends the job and activates its version in one transaction.

        The version is not activated when another one became active meanwhile than the one it was compared with.
        """
        with self._database.write() as connection:
            result = dict(outcome.result)
            if outcome.activate_version is not None:
                result |= self._activate(connection, outcome.activate_version)
            self._end(
                connection, "succeeded", "done", result=result, progress=1.0, eta_seconds=0.0, error=None
            )
            add_event(connection, "succeeded", result, job_id=self.job.id)

    def fail(self, stage: str | None, reason: str, *, retry: bool) -> None:
        """Ends the job, or queues it again after a delay when ``retry`` and attempts are left."""
        with self._database.write() as connection:
            row = connection.execute(select(jobs.c.stalled_attempts).where(jobs.c.id == self.job.id)).one()
            error = {"stage": stage, "reason": reason[:4000], "attempt": self.job.attempts}
            if retry and row.stalled_attempts < self.job.max_attempts:
                delay = min(_LONGEST_RETRY_DELAY, 2.0 ** (row.stalled_attempts - 1))
                self._update(
                    connection,
                    state="queued",
                    claim=None,
                    error=error,
                    message=f"will be tried again: {reason}"[:500],
                    not_before=time.time() + delay,
                    eta_seconds=None,
                )
                add_event(connection, "attempt_failed", error, job_id=self.job.id)
                return
            self._end(connection, "failed", reason[:500], error=error, eta_seconds=None)
            add_event(connection, "failed", error, job_id=self.job.id)

    def end_cancelled(self) -> None:
        with self._database.write() as connection:
            self._end(connection, "cancelled", "cancelled", eta_seconds=None)
            add_event(connection, "cancelled", {}, job_id=self.job.id)

    def release(self) -> None:
        """Gives the job back unfinished, because this worker stops; that costs no attempt."""
        with self._database.write() as connection:
            self._update(
                connection,
                state="queued",
                claim=None,
                message="waiting for a worker to go on",
                eta_seconds=None,
                stalled_attempts=jobs.c.stalled_attempts - 1,
            )
            add_event(connection, "interrupted", {"cause": "the worker was stopped"}, job_id=self.job.id)

    def _activate(self, connection: Connection, version: int) -> dict[str, Any]:
        catalog = Catalog(self._database)
        try:
            entry = self._require_adapter(connection)
        except ConflictError as error:
            return {"activated": False, "activation_reason": str(error)}
        if self.spec.activate == "if_better" and entry.active_version != self.spec.incumbent_version:
            reason = (
                f"version {entry.active_version} became active during the job; "
                f"this one was compared with {self.spec.incumbent_version}"
            )
            return {"activated": False, "activation_reason": reason}
        catalog.set_active_in(connection, entry, version, cause=f"job {self.job.id}")
        return {"activated": True}

    def _require_adapter(self, connection: Connection) -> Any:
        try:
            entry = Catalog(self._database).get_in(connection, self.job.adapter)
        except UnknownModelError as error:
            raise ClaimLostError(
                f"adapter {self.job.adapter!r} was deleted while job {self.job.id} ran"
            ) from error
        if entry.uid != self.job.adapter_uid:
            raise ConflictError(f"adapter {self.job.adapter!r} was replaced while job {self.job.id} ran")
        return entry

    def _end(self, connection: Connection, state: str, message: str, **values: Any) -> None:
        now = time.time()
        self._update(connection, state=state, message=message, finished_at=now, claim=None, **values)

    def _update(self, connection: Connection, **values: Any) -> None:
        if "message" in values:  # of an error, perhaps with a text of the user's in it
            values["message"] = values["message"].replace("\x00", "\ufffd")
        mine = (jobs.c.id == self.job.id) & (jobs.c.claim == self._token)
        result = connection.execute(update(jobs).where(mine).values(updated_at=time.time(), **values))
        if result.rowcount != 1:
            raise self._lost()

    def _lost(self) -> ClaimLostError:
        return ClaimLostError(f"job {self.job.id} no longer belongs to this worker")


def take_job(
    database: Database, worker: str, *, lease_seconds: float = DEFAULT_LEASE_SECONDS
) -> Claim | None:
    """The oldest job that waits, or whose worker is gone; ``None`` when there is none.

    Jobs that cannot go on (cancelled meanwhile, out of attempts, unreadable) are ended on the way.
    """
    with database.write() as connection:
        now = time.time()
        ready = (jobs.c.state == "queued") & (jobs.c.not_before <= now)
        query = select(jobs).where(or_(ready, jobs.c.state == "running")).order_by(jobs.c.created_at)
        for row in connection.execute(query).mappings().all():
            taken_over = row["state"] == "running"
            if taken_over and row["lease_expires_at"] > now and not is_certainly_dead(row["worker"]):
                continue
            job = job_from_row(row)
            if spec := _can_go_on(connection, job, taken_over):
                return _claim(database, connection, job, spec, worker, lease_seconds)
    return None


def _can_go_on(connection: Connection, job: Job, taken_over: bool) -> AdaptationSpec | None:
    if job.cancel_requested or not is_in_service(connection, job.adapter_uid):
        _finish(connection, job, "cancelled", "cancelled", None)
        return None
    if taken_over and job.stalled_attempts >= job.max_attempts:
        reason = (
            f"the worker process died {job.stalled_attempts} times in stage {job.stage!r} without finishing it "
            "(out of memory, or killed)"
        )
        _finish(
            connection, job, "failed", reason, {"stage": job.stage, "reason": reason, "attempt": job.attempts}
        )
        return None
    try:
        return AdaptationSpec.from_json(job.spec)
    except InvalidInputError as error:
        _finish(
            connection,
            job,
            "failed",
            str(error),
            {"stage": None, "reason": str(error), "attempt": job.attempts},
        )
        return None


def _finish(connection: Connection, job: Job, state: str, message: str, error: dict[str, Any] | None) -> None:
    now = time.time()
    values = {"state": state, "message": message[:500], "finished_at": now, "updated_at": now, "claim": None}
    if error is not None:
        values["error"] = error
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
    add_event(connection, state, error or {}, job_id=job.id)


def _claim(
    database: Database,
    connection: Connection,
    job: Job,
    spec: AdaptationSpec,
    worker: str,
    lease_seconds: float,
) -> Claim:
    token, now = uuid.uuid4().hex, time.time()
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job.id)
        .values(
            state="running",
            message="loading the models",
            claim=token,
            worker=worker,
            lease_expires_at=now + lease_seconds,
            attempts=job.attempts + 1,
            stalled_attempts=job.stalled_attempts + 1,
            started_at=job.started_at or now,
            updated_at=now,
        )
    )
    data = {"attempt": job.attempts + 1, "resumed": job.attempts > 0}
    add_event(connection, "started", data, job_id=job.id)
    row = connection.execute(select(jobs).where(jobs.c.id == job.id)).mappings().one()
    return Claim(database, job_from_row(row), spec, token, lease_seconds)
