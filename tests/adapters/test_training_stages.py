"""The real stages end to end on tiny random models: the numbers mean nothing, the artefacts and resuming do."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eda.adapters.errors import InvalidInputError, JobInterruptedError
from eda.adapters.jobs.pipeline import AdaptationResult, StageEvent, run_adaptation
from eda.adapters.jobs.spec import AdaptationSpec, DataKind, DataSpec, TargetKind, TrainingOptions
from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.serving.traffic import TrafficRecord, TrafficRecorder
from eda.adapters.store.store import AdapterStore
from eda.adapters.submission import AdaptationOptions
from eda.adapters.worker.stage_job import AdaptationDefaults, StageJob, StageModels
from eda.adapters.worker.stages import STAGES, TrainingStage
from eda.backends.loading import load_fine_tune, load_target
from eda.errors import DataError, MismatchError
from eda.formats.fingerprint import fingerprint_directory
from eda.models.draft import DraftModel
from tests.support.family import save_family

OPTIONS = TrainingOptions(
    intermediate_size=8, num_steps=4, batch_size=2, max_tokens=8, held_out=2, keep=0.5, seed=1
)
DEFAULTS = AdaptationDefaults(num_triage=2, evaluation_tokens=6, batch_size=4)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


class Job:
    """One adaptation, outside any queue."""

    def __init__(
        self, family: Path, directory: Path, *, model: str = "math", data: DataKind = "prompts"
    ) -> None:
        self.family = family
        self.base = load_target(family / "base")
        self.workspace = directory / "job"
        self.workspace.mkdir(parents=True)
        self.store = AdapterStore(directory / "adapters")
        kind: TargetKind = "target" if model == "base" else "full" if model == "full" else "lora"
        path = family / model
        tune = self.base if model == "base" else load_fine_tune(path, self.base, model)
        self.spec = AdaptationSpec(
            "job-1", model, "uid", kind, str(path), tune.fingerprint, DataSpec(data, 8), OPTIONS, margin=0.0
        )
        if data == "prompts":
            rows = [{"prompt": f"number {number} and the fox"} for number in range(8)]
            (self.workspace / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.events: list[StageEvent] = []

    def run(
        self, should_stop: Callable[[], bool] = lambda: False, kinds: Sequence[type[TrainingStage]] = STAGES
    ) -> AdaptationResult:
        models = StageModels.load(
            self.spec, self.family / "base", self.family / "draft", device="cpu", weights="float32"
        )
        job = StageJob(self.spec, models, self.store, defaults=DEFAULTS)
        stages = [kind(job) for kind in kinds]
        return run_adaptation(self.spec, self.workspace, stages, self.events.append, should_stop)

    def load(self) -> Any:
        loader = ModelLoader(self.base, DraftModel.load(self.family / "draft"))
        return loader.private_module(self.store, self.spec.adapter, 1, self.spec.fine_tune_fingerprint)


@pytest.mark.parametrize("model", ["math", "full", "base"])
def test_prompts_to_a_version_that_loads(family: Path, tmp_path: Path, model: str) -> None:
    job = Job(family, tmp_path, model=model)
    job.spec = replace(job.spec, triage=model == "base")
    result = job.run()
    assert result.version == 1
    manifest, module = job.load()
    assert module.config.intermediate_size == 8
    assert manifest.job_id == "job-1"
    assert set(manifest.metrics) >= {"plain", "before", "after"}
    assert manifest.metrics["after"]["mean_acceptance_length"] >= 1.0
    assert manifest.provenance["train"]["num_steps"] <= 4
    assert manifest.provenance["versions"]["torch"]
    kinds = {(event.kind, event.stage) for event in job.events}
    assert {("stage_finished", kind.name) for kind in STAGES} <= kinds
    assert ("metric", "train") in kinds
    assert job.run().version == 1  # everything is there: nothing is done twice


def test_progress_counts_what_was_asked_for_and_never_falls(family: Path, tmp_path: Path) -> None:
    job = Job(family, tmp_path, data="self")
    job.spec = replace(job.spec, data=DataSpec("self", 6), triage=False)
    job.run()
    by_stage: dict[str, list[StageEvent]] = {}
    for event in job.events:
        if event.kind == "progress":
            by_stage.setdefault(event.stage, []).append(event)
    assert {"regenerate", "train", "evaluate"} <= set(by_stage)
    for events in by_stage.values():
        fractions = [event.fraction for event in events]
        assert fractions == sorted(fractions)
    written = [event for event in by_stage["regenerate"] if event.message == "writing prompts"]
    answers = [event for event in by_stage["regenerate"] if not event.message]
    usable = written[-1].done  # the tiny model may write fewer than it is asked for
    assert {event.total for event in written} == {6}
    assert [(event.done, event.total) for event in answers] == [
        (number, usable) for number in range(1, usable + 1)
    ]
    assert answers[-1].fraction == 1.0


def test_triage_reports_what_the_shared_draft_keeps(family: Path, tmp_path: Path) -> None:
    job = Job(family, tmp_path)
    result = job.run()
    report = json.loads((job.workspace / "stages" / "triage.json").read_text())["result"]
    assert report["reason"].startswith("the shared draft keeps")
    assert (result.version is None) == (not report["worthwhile"])


def test_a_stop_in_any_place_is_resumed_to_the_same_weights(family: Path, tmp_path: Path) -> None:
    learning = replace(
        OPTIONS, intermediate_size=32, num_steps=24, learning_rate=0.05, max_tokens=24, held_out=3
    )
    whole = Job(family, tmp_path / "whole")
    whole.spec = replace(whole.spec, triage=False, training=learning)
    whole.run()
    manifest, expected = whole.load()
    assert manifest.provenance["train"]["best_step"] > 0, "weights that nothing was learned in prove nothing"
    pieces = Job(family, tmp_path / "pieces")
    pieces.spec = replace(pieces.spec, triage=False, training=learning)
    stops = 0
    for budget in range(3, 60, 6):
        asked = 0

        def stop(budget: int = budget) -> bool:
            nonlocal asked
            asked += 1
            return asked > budget

        try:
            pieces.run(stop)
            break
        except JobInterruptedError:
            stops += 1
    else:
        pieces.run()
    assert stops >= 3
    _, module = pieces.load()
    assert module.fingerprint() == expected.fingerprint()


def test_recorded_traffic_needs_no_prompts(family: Path, tmp_path: Path) -> None:
    job = Job(family, tmp_path, data="traffic")
    job.spec = replace(job.spec, triage=False)
    recorder = TrafficRecorder(tmp_path / "traffic")
    for number in range(8):
        ids = list(range(30, 40 + number))
        recorder.write(TrafficRecord("math", f"r{number}", ids[:6], ids[6:], 0.0, "length"))
    assert recorder.copy_to("math", job.workspace / "samples.jsonl") == 8
    assert job.run().version == 1
    marker = json.loads((job.workspace / "stages" / "regenerate.json").read_text())
    assert marker["result"] == {"num_samples": 6, "source": "recorded traffic"}


def test_a_fine_tune_that_changed_since_the_post_is_refused(family: Path, tmp_path: Path) -> None:
    job = Job(family, tmp_path)
    job.spec = replace(job.spec, fine_tune_fingerprint=fingerprint_directory(family / "code"))
    with pytest.raises(MismatchError, match="other weights now"):
        job.run()


def test_options_that_cannot_work(family: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"training\.score is 'luck'"):
        AdaptationOptions(TrainingOptions(score="luck"))
    job = Job(family, tmp_path)
    job.spec = replace(job.spec, training=replace(OPTIONS, max_tokens=600))
    with pytest.raises(DataError, match="leave no room for prompts"):
        job.run()


def test_answers_leave_room_for_prompts_in_a_short_model(family: Path, tmp_path: Path) -> None:
    job = Job(family, tmp_path)
    models = StageModels.load(job.spec, family / "base", family / "draft", device="cpu", weights="float32")
    model = models.fine_tune.model
    model.config = replace(model.config, max_position_embeddings=100)
    spec = replace(job.spec, training=TrainingOptions())
    config = StageJob(spec, models, job.store, defaults=DEFAULTS).regeneration
    assert (config.max_tokens, config.max_prompt_tokens) == (34, 34)


def test_an_incumbent_is_measured_beside_the_new_version(family: Path, tmp_path: Path) -> None:
    job = Job(family, tmp_path)
    job.spec = replace(job.spec, triage=False)
    job.run()
    job.workspace = tmp_path / "second"
    job.workspace.mkdir()
    (job.workspace / "prompts.jsonl").write_bytes((tmp_path / "job" / "prompts.jsonl").read_bytes())
    job.spec = replace(job.spec, job_id="job-2", incumbent_version=1)
    result = job.run()
    assert result.version == 2
    assert "of version 1" in result.reason
    assert result.metrics["incumbent"]["mean_acceptance_length"] >= 1.0
