"""What writers see of each other: threads that meet in one row leave what some order of them would leave."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from eda.adapters.database import Database, jobs
from eda.adapters.errors import (
    ClaimLostError,
    ConflictError,
    InvalidInputError,
    QueueFullError,
    UnknownJobError,
    UnknownModelError,
)
from eda.adapters.jobs.claims import Claim, take_job
from eda.adapters.jobs.queue import Job, new_job_id
from eda.adapters.jobs.spec import AdaptationSpec, DataSpec
from eda.adapters.worker.process import identity
from tests.adapters.helpers import Service

NUM_THREADS = 8
ROUNDS = 10


def together(*actions: Callable[[], object]) -> list[object]:
    """What the actions return or raise; they begin at the same moment."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], object]) -> object:
        barrier.wait(20)
        try:
            return action()
        except (ConflictError, QueueFullError, ClaimLostError) as error:
            return error

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, actions))


def claim_of(setup: Service, job: Job) -> str | None:
    with setup.database.read() as connection:
        return connection.execute(select(jobs.c.claim).where(jobs.c.id == job.id)).scalar_one()


def test_of_many_retries_one_counts(setup: Service) -> None:
    job = setup.submit("math")
    for _ in range(ROUNDS):
        setup.queue.cancel(job.id)
        outcomes = together(*[lambda: setup.queue.retry(job.id)] * NUM_THREADS)
        assert sum(isinstance(outcome, Job) for outcome in outcomes) == 1
    assert setup.event_types(job.id).count("queued") == 1 + ROUNDS


def test_a_cancelled_job_is_not_running(setup: Service) -> None:
    """Cancelling and taking a job at once: it is over before it ran, or runs and knows that it is to end."""
    for round_number in range(ROUNDS):
        job = setup.submit(f"tune-{round_number}")
        claim, _ = together(
            lambda: take_job(setup.database, identity()), lambda job=job: setup.queue.cancel(job.id)
        )
        row = setup.queue.get(job.id)
        if isinstance(claim, Claim):
            assert (row.state, row.cancel_requested) == ("running", True)
            assert claim.heartbeat() is True
            claim.end_cancelled()
        else:
            assert (row.state, claim_of(setup, job)) == ("cancelled", None)
            assert "started" not in setup.event_types(job.id)


def test_a_job_that_is_retried_while_it_is_taken_has_one_owner(setup: Service) -> None:
    job = setup.submit("math")
    for _ in range(ROUNDS):
        setup.queue.cancel(job.id)
        outcomes = together(
            *[lambda: setup.queue.retry(job.id)] * 4, *[lambda: take_job(setup.database, identity())] * 4
        )
        claims = [outcome for outcome in outcomes if isinstance(outcome, Claim)]
        assert len(claims) <= 1
        row = setup.queue.get(job.id)
        assert row.state == ("running" if claims else "queued")
        if claims:
            claims[0].release()


def test_an_expired_lease_goes_to_one_other_worker(setup: Service) -> None:
    job = setup.submit("math")
    first = take_job(setup.database, "unknown worker", lease_seconds=-1.0)
    assert first
    outcomes = together(*[lambda: take_job(setup.database, identity())] * NUM_THREADS, first.heartbeat)
    owners = [outcome for outcome in outcomes if isinstance(outcome, Claim)]
    # The first worker's heartbeat may come before the others: then the job is still its own.
    assert len(owners) == (1 if isinstance(outcomes[-1], ClaimLostError) else 0) or outcomes[-1] is False
    for owner in owners:
        assert owner.heartbeat() is False
        with pytest.raises(ClaimLostError):
            first.heartbeat()
    assert setup.event_types(job.id).count("started") == 1 + len(owners)


def test_one_idempotency_key_makes_one_job(setup: Service) -> None:
    entry = setup.register("math")

    def submit() -> None:
        spec = AdaptationSpec(
            new_job_id(), "math", entry.uid, "lora", "/x", "tune", DataSpec("self", 8), incumbent_version=None
        )
        with setup.database.write() as connection:
            setup.queue.insert(connection, spec, idempotency_key="once")

    outcomes = together(*[submit] * NUM_THREADS)
    assert sum(isinstance(outcome, ConflictError) for outcome in outcomes) == NUM_THREADS - 1
    assert len(setup.queue.page()) == 1


def test_the_queue_holds_no_more_than_its_limit(setup: Service) -> None:
    setup.queue.queue_limit = 3
    for index in range(NUM_THREADS):
        setup.register(f"tune-{index}")
    outcomes = together(*[lambda index=index: setup.submit(f"tune-{index}") for index in range(NUM_THREADS)])
    assert sum(isinstance(outcome, QueueFullError) for outcome in outcomes) == NUM_THREADS - 3
    assert setup.queue.counts()["queued"] == 3


def test_changes_of_one_adapter_are_all_kept(setup: Service) -> None:
    setup.register("math")
    together(
        *[
            lambda index=index: setup.catalog.patch("math", limits={f"limit_{index}": index})
            for index in range(NUM_THREADS)
        ]
    )
    entry = setup.catalog.get("math")
    assert entry.limits == {f"limit_{index}": index for index in range(NUM_THREADS)}
    assert entry.revision == 1 + NUM_THREADS


def test_one_of_many_rollbacks_counts(setup: Service) -> None:
    setup.register("math")
    setup.catalog.set_active("math", 2, cause="test")
    outcomes = together(
        *[lambda: setup.catalog.roll_back("math", version=2, to=1, cause="test")] * NUM_THREADS
    )
    assert sorted(outcomes) == [False] * (NUM_THREADS - 1) + [True]
    entry = setup.catalog.get("math")
    assert (entry.active_version, entry.rejected_versions) == (1, [2])


def test_a_reader_misses_no_event(setup: Service) -> None:
    """Whoever reads events after the last id that it saw gets every one, however many writers there are."""
    job = setup.submit("math")
    claim = take_job(setup.database, identity())
    assert claim
    seen: list[int] = []
    ended = threading.Event()

    def read() -> None:
        while True:
            last = ended.is_set()
            seen.extend(event.id for event in setup.queue.events_after(job.id, seen[-1] if seen else 0))
            if last:
                return

    def write(number: int) -> None:
        for step in range(10):
            claim.event("metric", {"writer": number, "step": step})

    reader = threading.Thread(target=read)
    reader.start()
    try:
        together(*[lambda number=number: write(number) for number in range(4)])
    finally:
        ended.set()
        reader.join(20)
    assert seen == [event.id for event in setup.queue.events_after(job.id)]
    assert len(seen) == 2 + 40  # queued and started came first


def test_values_that_one_database_takes_and_the_other_does_not(setup: Service) -> None:
    job = setup.submit("math")
    claim = take_job(setup.database, identity())
    assert claim
    claim.event("metric", {"loss": float("nan"), "best": [float("-inf"), 1.5], "text": "a\x00b"})
    assert setup.queue.events_after(job.id)[-1].data == {
        "loss": None,
        "best": [None, 1.5],
        "text": "a\x00b",
    }
    claim.progress("train", 0.5, None, "a text with \x00 in it")
    claim.fail("train", "the line 'a\x00b' is wrong", retry=False)
    assert setup.queue.get(job.id).error == {
        "stage": "train",
        "reason": "the line 'a\x00b' is wrong",
        "attempt": 1,
    }
    with pytest.raises((UnknownJobError, InvalidInputError)):
        setup.queue.get("job-\x00")
    with pytest.raises((UnknownModelError, InvalidInputError)):
        setup.catalog.get("a\x00")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://user:secret@localhost/eda", "it must begin with sqlite: or postgresql:"),
        ("postgresql+nonsense://user:secret@localhost/eda", "a driver that is not installed"),
        ("://secret", "cannot be read"),
    ],
)
def test_other_databases_are_refused(url: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        Database(url)
    assert message in str(refusal.value)
    assert "secret" not in str(refusal.value)
