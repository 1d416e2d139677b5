"""Stages that write files in small steps and can be killed anywhere; run as a script, a worker process with them."""

import json
import os
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from adapters.claims import Claim
from adapters.manifest import Manifest
from adapters.pipeline import Result, StageContext
from adapters.store import AdapterStore
from adapters.worker_process import WorkerSettings, run_worker

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


class FakeStages:
    """``steps`` steps of ``step_seconds`` in every stage, each leaving a trace that a resumed stage counts on."""

    def __init__(
        self,
        store: AdapterStore,
        claim: Claim | None,
        *,
        steps: int = 6,
        step_seconds: float = 0.02,
        after: float = 3.0,
        worthwhile: bool = True,
        fail_in: str | None = None,
    ) -> None:
        self.store = store
        self.claim = claim
        self.steps = steps
        self.step_seconds = step_seconds
        self.after = after
        self.worthwhile = worthwhile
        self.fail_in = fail_in
        self.calls: list[str] = []

    def _work(self, context: StageContext) -> int:
        """Appends one line a step to the stage's file, as regeneration does, and goes on after the last whole one."""
        self.calls.append(context.stage)
        if self.fail_in == context.stage:
            raise RuntimeError(f"stage {context.stage} is broken")
        path = context.workspace / f"{context.stage}.jsonl"
        done = _whole_lines(path)
        with path.open("a") as file:
            for step in range(len(done), self.steps):
                if context.should_stop():
                    return step
                file.write(json.dumps({"step": step}) + "\n")
                file.flush()
                time.sleep(self.step_seconds)
                context.progress(step + 1, self.steps, f"step {step + 1}")
                context.metric(step=step, loss=1.0 / (step + 1))
        assert [line["step"] for line in _whole_lines(path)] == list(range(self.steps))
        return self.steps

    def triage(self, context: StageContext) -> Result:
        self._work(context)
        return {"worthwhile": self.worthwhile, "reason": "as told"}

    def regenerate(self, context: StageContext) -> Result:
        return {"num_samples": self._work(context)}

    def select(self, context: StageContext) -> Result:
        return {"num_kept": self._work(context)}

    def train(self, context: StageContext) -> Result:
        self._work(context)
        write_weights(context.workspace / "private.safetensors")
        return {"steps": self.steps}

    def evaluate(self, context: StageContext) -> Result:
        self._work(context)
        before, after = {"mean_acceptance_length": 2.0}, {"mean_acceptance_length": self.after}
        incumbent = {"mean_acceptance_length": 2.5} if context.spec.incumbent_version else None
        return {"before": before, "after": after, "incumbent": incumbent}

    def publish(self, context: StageContext) -> Result:
        self._work(context)
        spec = context.spec
        manifest = manifest_for(spec.adapter, fine_tune=spec.fine_tune_fingerprint, job_id=spec.job_id)
        permit = self.claim.require_permission_to_publish if self.claim else lambda: None
        weights = context.workspace / "private.safetensors"
        return {"version": self.store.publish(weights, manifest, permit=permit).version}


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
    run_worker(settings, lambda claim: FakeStages(store, claim, step_seconds=step_seconds))


if __name__ == "__main__":
    work(WorkerSettings.from_environment(os.environ), 0.02)
