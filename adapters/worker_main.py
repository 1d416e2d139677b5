"""The worker that trains: ``python -m adapters.worker_main``, with its settings in the environment."""

import logging
import os

from adapters.claims import Claim
from adapters.pipeline import Stage
from adapters.worker_process import run_worker
from adapters.worker_settings import WorkerSettings


def run_training_worker(settings: WorkerSettings) -> None:
    """``run_worker`` with the stages of ``adapters.stages``."""

    def make_stages(claim: Claim) -> tuple[Stage, ...]:
        # torch comes with it: seconds and memory, which a worker without a job does not need
        from adapters.stages import stages_for_claim

        return stages_for_claim(settings, claim)

    run_worker(settings, make_stages)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    run_training_worker(WorkerSettings.from_environment(os.environ))


if __name__ == "__main__":
    main()
