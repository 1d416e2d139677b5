"""A stage that this project does not have: one class and a place in the tuple make it run, resume and be seen."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eda.adapters.errors import JobInterruptedError
from eda.adapters.jobs.pipeline import ProgressEstimator, Result, StageContext
from eda.adapters.worker.stages import STAGES, Publish, TrainingStage
from eda.training.data.samples import read_samples
from tests.adapters.fake_stages import FAKES, STAGE_NAMES, FakeStage, FakeWork, fake_stages
from tests.adapters.helpers import Service
from tests.adapters.test_training_stages import Job
from tests.support.family import save_family


class Audit(TrainingStage):
    """Counts the answers that are learned from."""

    name = "audit"
    weight = 0.5

    def run(self, context: StageContext) -> Result:
        samples = read_samples(context.workspace / "selected.jsonl")
        for number in range(len(samples)):
            context.progress(number + 1, len(samples), "auditing")
        return {"num_audited": len(samples)}


KINDS = (*(kind for kind in STAGES if kind is not Publish), Audit, Publish)


def test_a_new_stage_runs_once_and_stands_in_the_version(tmp_path: Path) -> None:
    job = Job(save_family(tmp_path / "family"), tmp_path)
    job.spec = replace(job.spec, triage=False)

    def stop() -> bool:
        return ("stage_started", "audit") in {(event.kind, event.stage) for event in job.events}

    with pytest.raises(JobInterruptedError, match="stopped in stage 'audit'"):
        job.run(stop, KINDS)
    assert job.store.versions("math") == []
    job.events.clear()

    assert job.run(kinds=KINDS).version == 1
    seen = [(event.kind, event.stage) for event in job.events]
    assert seen[0] == ("stage_started", "audit"), "the stages before it are finished"
    assert ("stage_finished", "audit") in seen
    counted = [(event.done, event.total) for event in job.events if event.stage == "audit" and event.total]
    kept = json.loads((job.workspace / "stages" / "select.json").read_text())["result"]["num_kept"]
    assert counted == [(number, kept) for number in range(1, kept + 1)]
    manifest, _ = job.load()
    assert manifest.provenance["audit"] == {"num_audited": kept}

    job.events.clear()
    assert job.run(kinds=KINDS).version == 1
    assert job.events == [], "the marker says that it is finished"


class FakeAudit(FakeStage):
    name = "audit"
    weight = 2.0


def test_its_weight_counts_in_the_progress_of_the_job(setup: Service) -> None:
    job = setup.submit("math")
    work = FakeWork(setup.store, None, steps=2, step_seconds=0)
    stages = fake_stages(work, FakeAudit)
    setup.worker(lambda claim: stages).run_one()
    assert setup.queue.get(job.id).state == "succeeded"
    assert work.calls == [*STAGE_NAMES, "audit"]
    estimator = ProgressEstimator(stages, lambda: 0.0)
    total = len(FAKES) + 2.0
    assert estimator.update("train", 0.5)[0] == pytest.approx(3.5 / total)
    assert estimator.update("audit", 0.0)[0] == pytest.approx(6.0 / total)
    assert estimator.update("audit", 1.0)[0] == pytest.approx(1.0)


def test_workspaces_of_earlier_releases_are_resumed_by_these_names() -> None:
    assert [kind.name for kind in STAGES] == STAGE_NAMES
