"""kill -9 of a worker that runs the real stages on tiny models: the weights are those of a run that nobody killed."""

import json
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from sqlalchemy import update

from eda.adapters.database import jobs
from eda.adapters.jobs.claims import Claim
from eda.adapters.jobs.pipeline import Stage
from eda.adapters.jobs.queue import new_job_id
from eda.adapters.jobs.spec import AdaptationSpec, DataSpec, TrainingOptions
from eda.adapters.serving.catalog import new_entry
from eda.adapters.worker.settings import WorkerSettings
from eda.adapters.worker.stage_job import AdaptationDefaults, StageJob, StageModels
from eda.adapters.worker.stages import stages_of
from eda.adapters.worker.worker_process import run_worker
from eda.backends.loading import load_fine_tune, load_target
from tests.adapters.helpers import Service, wait_for, warm_processes
from tests.support.family import save_family

OPTIONS = TrainingOptions(
    intermediate_size=32, num_steps=24, learning_rate=0.05, batch_size=2, max_tokens=24, held_out=3, seed=1
)
DEFAULTS = AdaptationDefaults(evaluation_tokens=8, batch_size=2)


def work(settings: WorkerSettings, loaded: Connection) -> None:
    """A worker process; it tells when it has its models and begins to work."""
    torch.set_num_threads(1)

    def make(claim: Claim) -> tuple[Stage, ...]:
        models = StageModels.load(
            claim.spec, Path(settings.target), Path(settings.draft), device="cpu", weights="float32"
        )
        store = Service(Path(settings.data_dir), settings.open_database()).store
        loaded.send(True)
        permit = claim.require_permission_to_publish
        return stages_of(StageJob(claim.spec, models, store, permit=permit, defaults=DEFAULTS))

    run_worker(settings, make)


def submit(setup: Service, family: Path, name: str) -> str:
    fine_tune = load_fine_tune(family / "math", load_target(family / "base"), name)
    entry = new_entry(name, "posted", "lora", str(family / "math"), fine_tune.fingerprint)
    job_id = new_job_id()
    spec = AdaptationSpec(
        job_id,
        name,
        entry.uid,
        "lora",
        entry.path,
        entry.fine_tune_fingerprint,
        DataSpec("prompts", 8),
        OPTIONS,
        triage=False,
        activate="always",
    )
    workspace = setup.workspaces.directory(job_id)
    workspace.mkdir()
    rows = [{"prompt": f"number {number} and the fox"} for number in range(8)]
    (workspace / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with setup.database.write() as connection:
        setup.catalog.insert_in(connection, entry)
        setup.queue.insert(connection, spec)
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(max_attempts=1000))
    return job_id


@pytest.mark.slow
def test_killed_real_workers_lose_and_change_nothing(
    tmp_path: Path, database_url: str, setup: Service
) -> None:
    family = save_family(tmp_path / "family")
    settings = WorkerSettings(
        str(tmp_path / "data"),
        str(family / "base"),
        str(family / "draft"),
        database_url,
        poll_seconds=0.02,
        niceness=0,
    )
    processes = warm_processes()
    chance = random.Random(11)
    names = ["undisturbed", "killed"]
    kills = 0
    for name in names:
        job_id = submit(setup, family, name)
        while not setup.queue.get(job_id).is_final:
            receiver, sender = processes.Pipe(duplex=False)
            process = processes.Process(target=work, args=(settings, sender))
            process.start()
            assert receiver.recv()
            # Lives grow by a constant factor: kills fall into every stage on machines of any speed, and it ends.
            patience = 80.0 if name == "undisturbed" else chance.uniform(0.01, 0.02) * 1.35**kills
            deadline = time.monotonic() + patience
            wait_for(
                lambda job_id=job_id, deadline=deadline: (
                    setup.queue.get(job_id).is_final or time.monotonic() > deadline
                ),
                timeout=90,
            )
            process.kill()
            process.join()
            sender.close()
            receiver.close()
            kills += name != "undisturbed"
        row = setup.queue.get(job_id)
        assert row.state == "succeeded", row.error
        assert setup.store.versions(name) == [1]
    report = setup.store.scan()
    assert report.problems == []
    assert len({manifest.weights_sha256 for manifest in report.manifests}) == 1
    assert report.manifests[0].provenance["train"]["best_step"] > 0, (
        "weights that learned nothing prove nothing"
    )
    assert kills >= 4
