"""The worker that trains: ``python -m eda.adapters.worker.main``, with its settings in the environment."""

import logging
import os

from eda.adapters.jobs.claims import Claim
from eda.adapters.jobs.pipeline import Stage
from eda.adapters.worker.settings import WorkerSettings
from eda.adapters.worker.worker_process import run_worker


def run_training_worker(settings: WorkerSettings) -> None:
    """``run_worker`` with the stages of ``eda.adapters.worker.stages``."""

    def make_stages(claim: Claim) -> tuple[Stage, ...]:
        # torch comes with it: seconds and memory, which a worker without a job does not need
        from eda.adapters.worker.stages import stages_for_claim

        return stages_for_claim(settings, claim)

    run_worker(settings, make_stages)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    run_training_worker(WorkerSettings.from_environment(os.environ))


if __name__ == "__main__":
    main()
