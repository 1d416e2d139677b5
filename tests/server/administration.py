"""A whole server for tests of administration: what a test needs of its inside, and a worker with fake stages."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from eda.adapters.jobs.claims import Claim
from eda.adapters.jobs.pipeline import Result, Stage, StageContext
from eda.adapters.service import AdapterService
from eda.adapters.worker.worker import Worker
from eda.files import PRIVATE_WEIGHTS_FILE
from eda.models.private import PrivateModule
from eda.server.services import Services
from tests.adapters.fake_stages import FakePublish, FakeTrain, FakeWork, fake_stages, manifest_for
from tests.support.family import save_lora

PROMPTS = ["the quick brown fox", "1 + 2 ="]


@dataclass
class Work(FakeWork):
    """For stages that make and publish a module that the tiny draft can use."""

    loader: Any = None


class Train(FakeTrain):
    work: Work

    def run(self, context: StageContext) -> Result:
        self.work.do(context)
        config = self.work.loader.draft.config.private_config(intermediate_size=4)
        module = PrivateModule.initialised(config, seed=self.work.steps)
        module.save(context.workspace / PRIVATE_WEIGHTS_FILE)
        return {}


class Publish(FakePublish):
    work: Work

    def run(self, context: StageContext) -> Result:
        spec, loader = context.spec, self.work.loader
        manifest = replace(
            manifest_for(spec.adapter, fine_tune=spec.fine_tune_fingerprint, job_id=spec.job_id),
            target_fingerprint=loader.base.fingerprint,
            draft_fingerprint=loader.draft.fingerprint(),
            sizes={"hidden_size": 32, "num_features": 96, "intermediate_size": 4, "fc_rank": 0},
            metrics=context.results["evaluate"],
        )
        weights = context.workspace / PRIVATE_WEIGHTS_FILE
        return {"version": self.work.store.publish(weights, manifest).version}


class Server:
    """A running server and what a test needs of its inside."""

    def __init__(self, url: str, services: Services, directory: Path) -> None:
        assert services.runtime is not None
        assert services.runtime.adapters is not None
        self.adapters: AdapterService = services.runtime.adapters
        self.services = services
        self.directory = directory
        self.client = httpx.Client(base_url=url, timeout=30)

    def lora(self, name: str, seed: int = 1) -> str:
        path = self.directory / "loras" / name
        if not path.exists():
            save_lora(path, seed)
        return str(path)

    def body(self, name: str, **changes: Any) -> dict[str, Any]:
        return {"name": name, "target": {"path": self.lora("one")}, "data": {"prompts": PROMPTS}} | changes

    def create(self, name: str, **changes: Any) -> httpx.Response:
        return self.client.post("/adapters", json=self.body(name, **changes))

    def work(self, *, steps: int = 2, **options: Any) -> bool:
        """Runs one job with fake stages, in this thread, and lets the registry follow."""

        def make(claim: Claim) -> list[Stage]:
            registry = self.adapters.registry
            work = Work(registry.store, claim, steps=steps, step_seconds=0, loader=registry.loader, **options)
            return fake_stages(work, Train, Publish)

        worker = Worker(self.adapters.database, self.adapters.workspaces, make, poll_seconds=0.02)
        ran = worker.run_one()
        self.adapters.registry.sync()
        return ran

    def complete(self, model: str, **changes: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": "the quick brown", "max_tokens": 12, "temperature": 0} | changes
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer
