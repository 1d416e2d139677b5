"""The worker process: takes jobs one at a time and runs them, gently, beside a server that answers users.

It never imports ``server``, and torch only when there is a job. It may be killed at any instant: whatever is finished
is on disk, and the next worker goes on from there.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from eda.adapters.database import Database
from eda.adapters.errors import AdapterServiceError, ClaimLostError, JobInterruptedError
from eda.adapters.jobs.claims import DEFAULT_LEASE_SECONDS, Claim, Outcome, take_job
from eda.adapters.jobs.pipeline import ProgressEstimator, Stage, StageEvent, run_adaptation
from eda.adapters.jobs.workspaces import Workspaces
from eda.adapters.store.files import MIB
from eda.adapters.worker.process import identity, resident_bytes
from eda.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

StagesFactory = Callable[[Claim], Sequence[Stage]]
_SECONDS_BETWEEN_REPORTS = 0.5
_SECONDS_BETWEEN_SWEEPS = 600.0
_HOPELESS = (DataError, CheckpointError, AdapterServiceError)
"""Errors that another attempt would meet again."""


class Worker:
    """Runs jobs until ``stop``.

    Args:
        make_stages: called once per job.
        poll_seconds: how often to look for a job, and how soon a cancellation is noticed.
        memory_limit_mib: resident memory above which the attempt fails; ``None`` sets no limit.
    """

    def __init__(
        self,
        database: Database,
        workspaces: Workspaces,
        make_stages: StagesFactory,
        *,
        lease_seconds: float = DEFAULT_LEASE_SECONDS,
        poll_seconds: float = 1.0,
        memory_limit_mib: int | None = None,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._make_stages = make_stages
        self._lease_seconds = lease_seconds
        self._poll_seconds = poll_seconds
        self._memory_limit_mib = memory_limit_mib
        self._identity = identity()
        self._stopping = threading.Event()
        self._claim: Claim | None = None

    def stop(self) -> None:
        """Asks the worker to save what it has, give its job back and return; safe in a signal handler."""
        self._stopping.set()

    def abandon(self) -> None:
        """Gives the job back in the middle of whatever is being done to it; the process must end right after.

        For a worker that cannot stop in time (models that load for minutes look at nothing): the job goes on after
        its last finished stage as after a death, but it costs no attempt.
        """
        claim = self._claim
        if claim is not None:
            with suppress(ClaimLostError):
                claim.release()

    def run(self, *, one_job: bool = False) -> None:
        """Works until ``stop`` or, with ``one_job``, until the first job has ended."""
        next_sweep = 0.0
        while not self._stopping.is_set():
            if self.run_one():
                if one_job:
                    return
                continue
            if time.monotonic() >= next_sweep:
                self._workspaces.sweep(self._database)
                next_sweep = time.monotonic() + _SECONDS_BETWEEN_SWEEPS
            self._stopping.wait(self._poll_seconds)

    def run_one(self) -> bool:
        """Takes one job and runs it as far as it gets; tells whether there was one."""
        claim = take_job(self._database, self._identity, lease_seconds=self._lease_seconds)
        if claim is None:
            return False
        logger.info("job %s for adapter %s: attempt %d", claim.job.id, claim.job.adapter, claim.job.attempts)
        watch = _ClaimWatch(
            claim, self._stopping, self._lease_seconds, self._poll_seconds, self._memory_limit_mib
        )
        reporter = _Reporter(claim)
        self._claim = claim
        try:
            with watch:
                self._run(claim, reporter, watch)
        except ClaimLostError as error:
            logger.warning("%s", error)
        finally:
            self._claim = None
        return True

    def _run(self, claim: Claim, reporter: "_Reporter", watch: "_ClaimWatch") -> None:
        workspace = self._workspaces.directory(claim.job.id)
        try:
            workspace.mkdir(parents=True, exist_ok=True)
            stages = self._make_stages(claim)
            reporter.expect(stages)
            result = run_adaptation(claim.spec, workspace, stages, reporter, watch.should_stop)
        except ClaimLostError:
            raise
        except JobInterruptedError:
            self._end_interrupted(claim, reporter, watch)
        except Exception as error:
            if watch.is_cancelled:
                claim.end_cancelled()
                return
            logger.error(
                "job %s failed in stage %s\n%s", claim.job.id, reporter.stage, traceback.format_exc()
            )
            reason = f"{type(error).__name__}: {error}"
            claim.fail(reporter.stage, reason, retry=not isinstance(error, _HOPELESS))
        else:
            version = result.version if result.activate else None
            claim.succeed(Outcome(result.to_json() | {"activated": False}, version))
            logger.info("job %s: %s", claim.job.id, result.reason)
            self._workspaces.remove(claim.job.id)

    def _end_interrupted(self, claim: Claim, reporter: "_Reporter", watch: "_ClaimWatch") -> None:
        if watch.is_lost:
            return
        if watch.over_memory is not None:
            claim.fail(reporter.stage, watch.over_memory, retry=True)
        elif claim.heartbeat():
            claim.end_cancelled()
        else:
            claim.release()


class _ClaimWatch:
    """A thread that keeps a claim alive, listens for cancellation and watches memory while a job runs."""

    def __init__(
        self,
        claim: Claim,
        stopping: threading.Event,
        lease_seconds: float,
        poll_seconds: float,
        memory_limit_mib: int | None,
    ) -> None:
        self._claim = claim
        self._stopping = stopping
        self._interval = min(lease_seconds / 4, poll_seconds)
        self._memory_limit_mib = memory_limit_mib
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="claim-watch", daemon=True)
        self.is_cancelled = False
        self.is_lost = False
        self.over_memory: str | None = None

    def __enter__(self) -> "_ClaimWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def should_stop(self) -> bool:
        return self.is_cancelled or self.is_lost or self.over_memory is not None or self._stopping.is_set()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                self.is_cancelled = self._claim.heartbeat() or self.is_cancelled
            except ClaimLostError:
                # Also the normal end: the job was ended between two heartbeats.
                self.is_lost = not self._ended.is_set()
                return
            except Exception as error:
                # A database that is away for a while costs at most the lease; the job itself is not harmed.
                logger.warning("heartbeat of job %s failed: %s", self._claim.job.id, error)
            limit = self._memory_limit_mib
            if limit is not None and resident_bytes() > limit * MIB:
                self.over_memory = (
                    f"the worker used {resident_bytes() // MIB} MiB and its limit is {limit} MiB; "
                    "use fewer or shorter samples, a smaller batch, or raise the limit"
                )


class _Reporter:
    """Writes a job's events to its row, no more often than readers can use."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._last: dict[str, float] = {}
        self.stage: str | None = claim.job.stage
        self.expect(())

    def expect(self, stages: Sequence[Stage]) -> None:
        """Names the stages whose events will come."""
        self._estimator = ProgressEstimator(stages, time.monotonic, self._claim.job.progress)

    def __call__(self, event: StageEvent) -> None:
        self.stage = event.stage
        if event.kind == "stage_started":
            self._claim.event("stage_started", {"stage": event.stage})
            self._progress(event)
        elif event.kind == "stage_finished":
            self._claim.stage_finished(event.stage, {"result": dict(event.data)})
            self._progress(event)
        elif event.kind == "message":
            self._claim.event("message", {"stage": event.stage, "message": event.message[:2000]})
        elif self._is_due(event.kind):
            if event.kind == "metric":
                self._claim.event("metric", {"stage": event.stage, **event.data})
            else:
                self._progress(event)

    def _progress(self, event: StageEvent) -> None:
        overall, eta = self._estimator.update(event.stage, event.fraction)
        self._claim.progress(event.stage, overall, eta, event.message or event.stage)

    def _is_due(self, kind: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(kind, float("-inf")) < _SECONDS_BETWEEN_REPORTS:
            return False
        self._last[kind] = now
        return True
