"""Trains a private module as a job does, on made-up answers, for ever; prints a line for each step.

    python -m benchmarks.training_load --models models --model math --scheduling batch

A stand-in for the worker process in ``serving_during_job``: the same priorities, threads and training step, without the
stages around it, so that it does the same thing for as long as it is measured.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch

from eda.adapters.worker.process import run_gently
from eda.backends.loading import load_fine_tune, load_target
from eda.models.draft import DraftModel
from eda.server.model_paths import model_paths
from eda.server.settings import load_settings
from eda.training.data.samples import Sample
from eda.training.learning.trainer import TrainingConfig
from eda.training.private_module import PrivateTrainingConfig, train_private_module
from eda.training.progress import ProgressEvent

NUM_STEPS = 1_000_000
PROMPT_TOKENS, ANSWER_TOKENS = 40, 96


def made_up_samples(count: int, vocab_size: int, seed: int) -> list[Sample]:
    """What a step costs depends on lengths alone."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(length))

    return [Sample(f"{seed}-{place}", ids(PROMPT_TOKENS), ids(ANSWER_TOKENS)) for place in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, help="family directory [the bundled one]")
    parser.add_argument("--model", default="math", help="fine-tune to adapt to")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads [half of the machine's]")
    parser.add_argument("--batch-size", type=int, default=4, help="samples in a step")
    parser.add_argument("--niceness", type=int, default=10)
    parser.add_argument("--scheduling", choices=("idle", "batch", "normal"), default="batch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or max(1, (torch.get_num_threads() + 1) // 2))
    paths = model_paths(load_settings(None, {"models_dir": arguments.models}))
    if paths.draft is None:
        raise SystemExit("benchmarks.training_load: the family has no draft to train for")
    target = load_target(paths.target)
    fine_tune = load_fine_tune(paths.fine_tunes[arguments.model], target, arguments.model)

    def report(event: ProgressEvent) -> None:
        if event.message:  # a measurement
            return
        if event.done == 2:  # not from the start: on a busy machine loading the models would never end
            run_gently(arguments.niceness, arguments.scheduling)
        print(event.done, flush=True)

    training = TrainingConfig(
        num_steps=NUM_STEPS, batch_size=arguments.batch_size, evaluate_every=NUM_STEPS, patience=None
    )
    with tempfile.TemporaryDirectory() as directory:
        try:
            train_private_module(
                fine_tune,
                DraftModel.load(paths.draft, dtype=torch.float32),
                made_up_samples(64, target.config.vocab_size, seed=1),
                made_up_samples(1, target.config.vocab_size, seed=2),
                Path(directory),
                PrivateTrainingConfig(training=training),
                on_progress=report,
            )
        except BrokenPipeError:  # nobody reads any more
            sys.stderr.close()


if __name__ == "__main__":
    main()
