"""kill -9 at random instants: nothing half-done is ever visible, nothing finished is ever lost."""

import multiprocessing
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import update

from eda.adapters.database import Database, jobs
from eda.adapters.jobs.pipeline import Result, StageContext
from eda.adapters.store.store import AdapterStore
from tests.adapters.fake_stages import (
    STAGE_NAMES,
    FakePublish,
    FakeWork,
    fake_stages,
    manifest_for,
    write_weights,
)
from tests.adapters.helpers import Service, stop, wait_for

STAGE_SECONDS = 0.3


def checksums(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def require_consistency(setup: Service, names: list[str]) -> None:
    """One valid version per finished job, nothing that a reader could take for another."""
    report = AdapterStore(setup.store.root).scan()
    assert report.problems == []
    assert sorted((manifest.name, manifest.version) for manifest in report.manifests) == [
        (n, 1) for n in names
    ]
    job_ids = [manifest.job_id for manifest in report.manifests]
    assert len(set(job_ids)) == len(job_ids)
    for name in names:
        assert setup.catalog.get(name).active_version == 1
    if setup.database.engine.dialect.name != "sqlite":
        return
    with setup.database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"


@pytest.mark.slow
def test_a_worker_killed_in_every_stage(setup: Service) -> None:
    chance = random.Random(7)
    names: list[str] = []
    kills = 0
    for round_number in range(4):
        names.append(f"tune-{round_number}")
        earlier = {name: checksums(setup.store.root / name) for name in names[:-1]}
        job = setup.submit(names[-1])
        with setup.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(max_attempts=100))
        for stage in STAGE_NAMES:
            worker = setup.start_worker(step_seconds=STAGE_SECONDS / 6)
            try:
                wait_for(
                    lambda job=job, stage=stage: _has_reached(setup, job.id, stage), what=f"stage {stage}"
                )
                time.sleep(chance.uniform(0.0, STAGE_SECONDS))
            finally:
                worker.kill()
                worker.join()
            kills += 1
            assert all(checksums(setup.store.root / name) == files for name, files in earlier.items())
            assert AdapterStore(setup.store.root).scan().problems == []
        worker = setup.start_worker(step_seconds=0.001)
        try:
            wait_for(lambda job=job: setup.queue.get(job.id).is_final, what="the job's end")
        finally:
            stop(worker)
        assert setup.queue.get(job.id).state == "succeeded"
        setup.store.clean()
        require_consistency(setup, names)
    assert kills >= 20


def _has_reached(setup: Service, job_id: str, stage: str) -> bool:
    job = setup.queue.get(job_id)
    return job.is_final or (
        job.stage is not None and STAGE_NAMES.index(job.stage) >= STAGE_NAMES.index(stage)
    )


class Killed(BaseException):
    """Stands for the death of the process: no handler of the worker catches it."""


@pytest.mark.parametrize("moment", ["in permit", "after rename", "after marker"])
def test_death_around_publishing_makes_no_second_version(setup: Service, moment: str) -> None:
    job = setup.submit("math")

    class DyingPublish(FakePublish):
        def run(self, context: StageContext) -> Result:
            if moment == "in permit":
                manifest = manifest_for("math", fine_tune="tune", job_id=job.id)

                def die() -> None:
                    raise Killed

                self.work.store.publish(context.workspace / "private.safetensors", manifest, permit=die)
            result = super().run(context)
            if moment == "after rename":
                raise Killed
            return result

    worker = setup.worker(
        lambda claim: fake_stages(FakeWork(setup.store, claim, steps=1, step_seconds=0), DyingPublish),
        lease_seconds=0.1,
    )
    if moment == "after marker":
        worker._workspaces.remove = _die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        worker.run_one()
    assert setup.store.versions("math") == ([] if moment == "in permit" else [1])
    time.sleep(0.15)
    setup.worker().run_one()
    assert setup.queue.get(job.id).state == "succeeded"
    require_consistency(setup, ["math"])


def _die(job_id: str) -> None:
    raise Killed


def test_the_next_worker_removes_what_a_killed_one_was_writing(setup: Service) -> None:
    job = setup.submit("math")
    unfinished = setup.store.root / ".unfinished"

    def die_while_writing(*_: object) -> None:
        assert list(unfinished.iterdir())
        os._exit(9)

    def work_and_die() -> None:
        setup.database.engine.dispose(close=False)  # connections are not shared with the parent
        store = AdapterStore(setup.store.root)
        patch = pytest.MonkeyPatch()
        patch.setattr("eda.adapters.store.store.sync_tree", die_while_writing)
        setup.worker(
            lambda claim: fake_stages(FakeWork(store, claim, steps=1, step_seconds=0)), lease_seconds=0.1
        ).run_one()

    process = multiprocessing.get_context("fork").Process(target=work_and_die)
    process.start()
    process.join(30)
    assert process.exitcode == 9
    assert list(unfinished.iterdir()), "the test needs a version that was being written"
    setup.queue.cancel(job.id)  # so that it is not published after all, which would clean up too
    worker = setup.start_worker()
    try:
        wait_for(lambda: not unfinished.exists(), what="an empty store")
        wait_for(lambda: setup.queue.get(job.id).state == "cancelled", what="the job's end")
    finally:
        stop(worker)
    assert setup.store.versions("math") == []


def test_two_processes_never_take_the_same_version_number(setup: Service, tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors")
    first = setup.store.publish(tmp_path / "w.safetensors", manifest_for("math", job_id="a"))
    again = AdapterStore(setup.store.root).publish(
        tmp_path / "w.safetensors", manifest_for("math", job_id="a")
    )
    other = AdapterStore(setup.store.root).publish(
        tmp_path / "w.safetensors", manifest_for("math", job_id="b")
    )
    assert (first.version, again.version, other.version) == (1, 1, 2)


def test_processes_that_start_together_share_a_new_database(database_url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        for database in pool.map(lambda _: Database(database_url), range(8)):
            database.close()
