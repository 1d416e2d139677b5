"""The job table: states, claims, attempts, cancellation, retry, events."""

import os
import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import update

from eda.adapters.database import jobs
from eda.adapters.errors import (
    ClaimLostError,
    ConflictError,
    JobInterruptedError,
    QueueFullError,
    UnknownJobError,
)
from eda.adapters.jobs.claims import Claim, Outcome, take_job
from eda.adapters.jobs.pipeline import Result, Stage, StageContext
from eda.adapters.worker import process
from eda.adapters.worker.process import identity
from tests.adapters.fake_stages import (
    STAGE_NAMES,
    FakeRegenerate,
    FakeTrain,
    FakeTriage,
    FakeWork,
    fake_stages,
)
from tests.adapters.helpers import Service, wait_for


def test_a_job_runs_publishes_and_activates(setup: Service) -> None:
    job = setup.submit("math")
    assert setup.worker().run_one()
    done = setup.queue.get(job.id)
    assert (done.state, done.progress, done.attempts) == ("succeeded", 1.0, 1)
    assert done.result is not None
    assert (done.result["version"], done.result["activated"]) == (1, True)
    assert setup.catalog.get("math").active_version == 1
    assert setup.store.verify("math", 1).job_id == job.id
    finished = [e.data["stage"] for e in setup.queue.events_after(job.id) if e.type == "stage_finished"]
    assert finished == STAGE_NAMES
    assert "metric" in setup.event_types(job.id)
    assert not setup.workspaces.directory(job.id).exists()


def test_shown_progress_never_falls_whatever_stages_report(
    setup: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over a worker's death in the middle of a stage, after which the stage begins anew."""
    monkeypatch.setattr("eda.adapters.worker.worker._SECONDS_BETWEEN_REPORTS", 0.0)
    shown: list[float] = []
    original = Claim.progress

    def spy(claim: Claim, stage: str, fraction: float, *rest: object) -> None:
        original(claim, stage, fraction, *rest)  # type: ignore[arg-type]
        shown.append(setup.queue.get(claim.job.id).progress)

    monkeypatch.setattr(Claim, "progress", spy)

    class Jumping(FakeTrain):
        deadly = True

        def run(self, context: StageContext) -> Result:
            for done in (1, 9, 2, 5):
                context.progress(done, 10)
            if self.deadly:
                raise Died
            return super().run(context)

    class Surviving(Jumping):
        deadly = False

    def make(kind: type[FakeTrain]) -> Callable[[Claim], list[Stage]]:
        return lambda claim: fake_stages(FakeWork(setup.store, claim, steps=2, step_seconds=0.0), kind)

    job = setup.submit("math")
    with pytest.raises(Died):
        setup.worker(make(Jumping), lease_seconds=0.1).run_one()
    before = shown[-1]
    time.sleep(0.15)
    assert setup.worker(make(Surviving)).run_one()
    assert setup.queue.get(job.id).state == "succeeded"
    assert shown == sorted(shown)
    assert shown.count(before) > 4, "the second attempt goes through what the first had shown"


class Died(BaseException):
    """Stands for the death of the process: no handler of the worker catches it."""


def test_events_resume_after_an_id(setup: Service) -> None:
    job = setup.submit("math")
    setup.worker().run_one()
    everything = setup.queue.events_after(job.id)
    assert [event.id for event in everything] == sorted({event.id for event in everything})
    assert setup.queue.events_after(job.id, everything[3].id) == everything[4:]


def test_two_workers_never_share_a_job(setup: Service) -> None:
    for index in range(4):
        setup.submit(f"tune-{index}")
    claims = []
    threads = [
        threading.Thread(target=lambda: claims.append(take_job(setup.database, identity()))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [claim.job.id for claim in claims if claim]
    assert len(taken) == len(set(taken)) == 4


def test_a_live_worker_keeps_its_job_and_an_expired_lease_loses_it(setup: Service) -> None:
    setup.submit("math")
    first = take_job(setup.database, identity(), lease_seconds=0.2)
    assert first
    assert take_job(setup.database, identity()) is None
    time.sleep(0.25)
    second = take_job(setup.database, identity())
    assert second
    assert second.job.attempts == 2
    for write in (first.heartbeat, first.end_cancelled, first.release, first.require_permission_to_publish):
        with pytest.raises(ClaimLostError):
            write()
    with pytest.raises(ClaimLostError):
        first.succeed(Outcome({}))
    assert second.heartbeat() is False


def test_a_dead_process_is_taken_over_at_once(setup: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.submit("math")
    me = identity()
    gone = me.replace(f'"pid": {os.getpid()}', '"pid": 4194303')
    assert take_job(setup.database, gone, lease_seconds=3600)
    assert take_job(setup.database, me) is not None
    monkeypatch.setattr(process, "_host", lambda: "elsewhere")
    assert not process.is_certainly_dead(gone)


def test_a_poison_job_fails_with_its_reason(setup: Service) -> None:
    job = setup.submit("math")
    work = FakeWork(setup.store, None, step_seconds=0, fail_in="train")
    worker = setup.worker(lambda claim: fake_stages(work))
    for attempt in range(1, 4):
        assert worker.run_one()
        row = setup.queue.get(job.id)
        assert row.error == {
            "stage": "train",
            "reason": "RuntimeError: stage train is broken",
            "attempt": attempt,
        }
        with setup.database.write() as connection:  # do not sit out the delay
            connection.execute(update(jobs).values(not_before=0.0))
    # Attempts count from the last finished stage, and the first attempt finished three.
    assert setup.queue.get(job.id).state == "failed"
    assert setup.store.versions("math") == []
    assert not worker.run_one()


def test_a_job_whose_worker_dies_again_and_again_fails(setup: Service) -> None:
    job = setup.submit("math")
    for _ in range(3):
        claim = take_job(setup.database, "unknown worker", lease_seconds=-1.0)
        assert claim
    assert take_job(setup.database, identity()) is None
    row = setup.queue.get(job.id)
    assert row.state == "failed"
    assert row.error
    assert "died 3 times" in row.error["reason"]


def test_a_data_error_is_not_tried_again(setup: Service) -> None:
    from eda.errors import DataError

    class Hopeless(FakeRegenerate):
        def run(self, context: StageContext) -> Result:
            raise DataError("line 3 is empty")

    job = setup.submit("math")
    work = FakeWork(setup.store, None, step_seconds=0)
    setup.worker(lambda claim: fake_stages(work, Hopeless)).run_one()
    row = setup.queue.get(job.id)
    assert (row.state, row.attempts) == ("failed", 1)
    assert row.message == "DataError: line 3 is empty"


def test_retry_resumes_after_the_finished_stages(setup: Service) -> None:
    job = setup.submit("math")
    broken = FakeWork(setup.store, None, step_seconds=0, fail_in="evaluate")
    setup.queue.max_attempts = 1
    worker = setup.worker(lambda claim: fake_stages(broken))
    with setup.database.write() as connection:
        connection.execute(update(jobs).values(max_attempts=1))
    worker.run_one()
    assert setup.queue.get(job.id).state == "failed"
    assert setup.queue.retry(job.id).state == "queued"
    with pytest.raises(ConflictError, match="only a failed or cancelled"):
        setup.queue.retry(job.id)
    good = FakeWork(setup.store, None, step_seconds=0)
    setup.worker(lambda claim: fake_stages(good)).run_one()
    assert setup.queue.get(job.id).state == "succeeded"
    assert good.calls == ["evaluate", "publish"]


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_cancel_in_every_stage(setup: Service, stage: str) -> None:
    job = setup.submit("math")

    class CancelledThere(FakeWork):
        def do(self, context: StageContext) -> None:
            if context.stage == stage:
                setup.queue.cancel(job.id)
                wait_for(context.should_stop)
            super().do(context)

    setup.worker(lambda claim: fake_stages(CancelledThere(setup.store, claim, step_seconds=0))).run_one()
    row = setup.queue.get(job.id)
    assert (row.state, row.stage) == ("cancelled", stage)
    assert setup.store.versions("math") == []
    assert setup.catalog.get("math").active_version is None
    assert setup.queue.cancel(job.id).state == "cancelled"
    # A cancelled job can be taken up again where it stopped.
    setup.queue.retry(job.id)
    setup.worker().run_one()
    assert setup.queue.get(job.id).state == "succeeded"


def test_cancel_waiting_and_finished_jobs(setup: Service) -> None:
    waiting = setup.submit("math")
    assert setup.queue.cancel(waiting.id).state == "cancelled"
    assert not setup.worker().run_one()
    done = setup.submit("math")
    setup.worker().run_one()
    with pytest.raises(ConflictError, match="has succeeded"):
        setup.queue.cancel(done.id)
    with pytest.raises(UnknownJobError):
        setup.queue.cancel("job-unknown")


def test_a_cancelled_job_of_a_dead_worker_ends(setup: Service) -> None:
    job = setup.submit("math")
    take_job(setup.database, "unknown worker", lease_seconds=-1.0)
    setup.queue.cancel(job.id)
    assert take_job(setup.database, identity()) is None
    assert setup.queue.get(job.id).state == "cancelled"


def test_a_stopped_worker_gives_its_job_back_without_losing_an_attempt(setup: Service) -> None:
    job = setup.submit("math")

    def stop_soon(claim: Claim) -> list[Stage]:
        worker.stop()
        return fake_stages(FakeWork(setup.store, None, step_seconds=0))

    for _ in range(5):
        worker = setup.worker(stop_soon)
        worker.run_one()
        assert setup.queue.get(job.id).state == "queued"
    setup.worker().run_one()
    assert setup.queue.get(job.id).state == "succeeded"


def test_a_worker_that_cannot_stop_in_time_gives_its_job_back_too(setup: Service) -> None:
    """Models that load for minutes look at no flag; stopping the server then must not use up the attempts."""
    job = setup.submit("math")
    loading, ended = threading.Event(), threading.Event()

    class Loading(FakeTriage):
        def run(self, context: StageContext) -> Result:
            loading.set()
            ended.wait(20)  # until the "process" has ended
            return super().run(context)

    for _ in range(4):
        work = FakeWork(setup.store, None, steps=1, step_seconds=0)
        worker = setup.worker(lambda claim, work=work: fake_stages(work, Loading))
        loading.clear()
        ended.clear()
        thread = threading.Thread(target=worker.run_one)
        thread.start()
        assert loading.wait(20)
        worker.stop()
        worker.abandon()
        row = setup.queue.get(job.id)
        assert (row.state, row.stalled_attempts) == ("queued", 0)
        ended.set()
        thread.join(20)
        assert setup.queue.get(job.id).state == "queued"
    assert setup.event_types(job.id).count("interrupted") == 4
    worker.abandon()  # without a job: nothing happens
    setup.worker().run_one()
    assert setup.queue.get(job.id).state == "succeeded"


def test_memory_limit_ends_the_attempt(setup: Service) -> None:
    job = setup.submit("math")
    slow = FakeWork(setup.store, None, steps=200, step_seconds=0.02)
    setup.worker(lambda claim: fake_stages(slow), memory_limit_mib=1).run_one()
    row = setup.queue.get(job.id)
    assert row.state == "queued"
    assert row.error
    assert "its limit is 1 MiB" in row.error["reason"]


def test_queue_limit(setup: Service) -> None:
    setup.queue.queue_limit = 2
    setup.submit("a")
    setup.submit("b")
    with pytest.raises(QueueFullError, match="2 jobs wait"):
        setup.submit("c")


def test_publishing_needs_a_live_claim(setup: Service) -> None:
    job = setup.submit("math")
    claim = take_job(setup.database, identity())
    assert claim
    claim.require_permission_to_publish()
    setup.queue.cancel(job.id)
    with pytest.raises(JobInterruptedError):
        claim.require_permission_to_publish()


def test_deleting_an_adapter_ends_its_jobs(setup: Service) -> None:
    job = setup.submit("math")
    claim = take_job(setup.database, identity())
    assert claim
    setup.catalog.begin_deletion("math")
    assert claim.heartbeat() is True
    assert setup.queue.get(job.id).cancel_requested


def test_jobs_of_a_deleted_adapter_end_and_cannot_be_retried(setup: Service) -> None:
    running, waiting = setup.submit("math"), setup.submit("math")
    claim = take_job(setup.database, "unknown worker", lease_seconds=-1.0)
    assert claim
    (setup.workspaces.directory(running.id)).mkdir()
    entry = setup.catalog.begin_deletion("math")
    assert setup.queue.get(waiting.id).state == "cancelled"
    setup.catalog.finish_deletion(entry.uid)
    with pytest.raises(JobInterruptedError):
        claim.require_permission_to_publish()
    assert not setup.worker().run_one()
    assert setup.queue.get(running.id).state == "cancelled"
    with pytest.raises(ConflictError, match="was deleted"):
        setup.queue.retry(running.id)
    setup.workspaces.sweep(setup.database)
    assert not setup.workspaces.directory(running.id).exists()


def test_sweeping_keeps_what_may_be_used_again(setup: Service) -> None:
    failed, waiting = setup.submit("math"), setup.submit("code")
    setup.queue.cancel(failed.id)
    young = setup.workspaces.directory("job-not-entered-yet")
    for path in (setup.workspaces.directory(failed.id), setup.workspaces.directory(waiting.id), young):
        path.mkdir()
    setup.workspaces.sweep(setup.database)
    assert len(list(setup.workspaces.root.glob("job-*"))) == 3
    with setup.database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == failed.id).values(finished_at=1.0))
    os.utime(young, (1.0, 1.0))
    setup.workspaces.sweep(setup.database)
    assert [path.name for path in setup.workspaces.root.glob("job-*")] == [waiting.id]


def test_pages(setup: Service) -> None:
    ids = [setup.submit(name).id for name in ("a", "b", "c")]
    assert [job.id for job in setup.queue.page(limit=2)] == ids[:0:-1]
    assert [job.id for job in setup.queue.page(after=ids[1])] == ids[:1]
    assert [job.id for job in setup.queue.page(adapter="b")] == [ids[1]]
    setup.queue.cancel(ids[0])
    assert [job.id for job in setup.queue.page(state="cancelled")] == [ids[0]]
