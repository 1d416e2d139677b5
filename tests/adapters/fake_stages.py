"""Stages that write files in small steps and can be killed anywhere; run as a script, a worker process with them."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from eda.adapters.jobs.claims import Claim
from eda.adapters.jobs.pipeline import Result, Stage, StageContext
from eda.adapters.store.manifest import Manifest
from eda.adapters.store.store import AdapterStore
from eda.adapters.worker.settings import WorkerSettings
from eda.adapters.worker.worker_process import run_worker
from eda.files import PRIVATE_WEIGHTS_FILE

HIDDEN_SIZE = 8
SIZES = {"hidden_size": HIDDEN_SIZE, "num_features": 3 * HIDDEN_SIZE, "intermediate_size": 4, "fc_rank": 0}


def write_weights(path: Path, value: float = 0.5) -> None:
    """A private module of ``SIZES`` whose values are all ``value``."""
    size, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    tensors = {
        "gate_up_proj": np.full((2 * inner, size), value, dtype=np.float32),
        "down_proj": np.full((size, inner), value, dtype=np.float32),
    }
    save_file(tensors, path)


def manifest_for(
    name: str, *, fine_tune: str = "tune", job_id: str | None = None, **metrics: float
) -> Manifest:
    provenance = {"job_id": job_id} if job_id else {}
    return Manifest(
        name=name,
        version=0,
        created="2026-01-01T00:00:00Z",
        target_fingerprint="target",
        fine_tune_fingerprint=fine_tune,
        draft_fingerprint="draft",
        sizes=SIZES,
        weights_bytes=0,
        weights_sha256="",
        provenance=provenance,
        metrics=metrics,
    )


@dataclass
class FakeWork:
    """What every fake stage does: ``steps`` steps of ``step_seconds``, whose traces a resumed stage counts on."""

    store: AdapterStore
    claim: Claim | None
    steps: int = 6
    step_seconds: float = 0.02
    after: float = 3.0
    worthwhile: bool = True
    fail_in: str | None = None
    calls: list[str] = field(default_factory=list)

    def do(self, context: StageContext) -> None:
        """Appends one line a step to the stage's file, as regeneration does, and goes on after the last whole one."""
        self.calls.append(context.stage)
        if self.fail_in == context.stage:
            raise RuntimeError(f"stage {context.stage} is broken")
        path = context.workspace / f"{context.stage}.jsonl"
        done = _whole_lines(path)
        with path.open("a") as file:
            for step in range(len(done), self.steps):
                if context.should_stop():
                    return
                file.write(json.dumps({"step": step}) + "\n")
                file.flush()
                time.sleep(self.step_seconds)
                context.progress(step + 1, self.steps, f"step {step + 1}")
                context.metric(step=step, loss=1.0 / (step + 1))
        assert [line["step"] for line in _whole_lines(path)] == list(range(self.steps))


class FakeStage(Stage):
    """Does the work and has nothing to say about it."""

    weight = 1.0

    def __init__(self, work: FakeWork) -> None:
        self.work = work

    def run(self, context: StageContext) -> Result:
        self.work.do(context)
        return {}


class FakeTriage(FakeStage):
    name = "triage"

    def verdict(self, result: Result) -> str | None:
        return None if self.work.worthwhile else "as told"


class FakeRegenerate(FakeStage):
    name = "regenerate"


class FakeSelect(FakeStage):
    name = "select"


class FakeTrain(FakeStage):
    name = "train"

    def run(self, context: StageContext) -> Result:
        write_weights(context.workspace / PRIVATE_WEIGHTS_FILE)
        return super().run(context)


class FakeEvaluate(FakeStage):
    name = "evaluate"

    def run(self, context: StageContext) -> Result:
        before, after = {"mean_acceptance_length": 2.0}, {"mean_acceptance_length": self.work.after}
        incumbent = {"mean_acceptance_length": 2.5} if context.spec.incumbent_version else None
        return super().run(context) | {"before": before, "after": after, "incumbent": incumbent}


class FakePublish(FakeStage):
    name = "publish"
    is_final = True

    def run(self, context: StageContext) -> Result:
        self.work.do(context)
        spec, claim = context.spec, self.work.claim
        manifest = manifest_for(spec.adapter, fine_tune=spec.fine_tune_fingerprint, job_id=spec.job_id)
        permit = claim.require_permission_to_publish if claim else lambda: None
        weights = context.workspace / PRIVATE_WEIGHTS_FILE
        return {"version": self.work.store.publish(weights, manifest, permit=permit).version}


FAKES: tuple[type[FakeStage], ...] = (
    FakeTriage,
    FakeRegenerate,
    FakeSelect,
    FakeTrain,
    FakeEvaluate,
    FakePublish,
)
STAGE_NAMES = [kind.name for kind in FAKES]


def fake_stages(work: FakeWork, *others: type[FakeStage]) -> list[Stage]:
    """The stages of ``work``; each of ``others`` takes the place of the one with its name."""
    kinds = {kind.name: kind for kind in (*FAKES, *others)}
    return [kind(work) for kind in kinds.values()]


def _whole_lines(path: Path) -> list[dict[str, int]]:
    """The lines of a file, after a half-written last one was cut off."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) != len(raw):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def work(settings: WorkerSettings, step_seconds: float) -> None:
    """A worker process's life."""
    store = AdapterStore(settings.store_directory)
    run_worker(settings, lambda claim: fake_stages(FakeWork(store, claim, step_seconds=step_seconds)))


if __name__ == "__main__":
    work(WorkerSettings.from_environment(os.environ), 0.02)
