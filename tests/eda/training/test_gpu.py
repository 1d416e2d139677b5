"""The stages of training on a GPU, in bfloat16: devices and types fit together, and acceptance rises."""

import pytest
import torch

from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.training.data.scores import SCORES
from eda.training.data.selection import score_samples
from eda.training.learning.trainees import lora_trainee, private_trainee, shared_trainee
from eda.training.learning.trainer import TrainingConfig, train
from tests.support.toys import cyclic_samples, cyclic_target, dataset_of, new_draft

CONFIG = TrainingConfig(num_steps=60, batch_size=8, unroll_steps=3, learning_rate=1e-2, patience=None)


@pytest.mark.gpu
def test_training_and_selection_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    base, shifted = (cyclic_target(step).to("cuda", torch.bfloat16) for step in (1, 5))
    draft = new_draft(base).to("cuda")
    known, held_out = (dataset_of(base, cyclic_samples(count, 1, seed=count)) for count in (32, 6))
    assert train(shared_trainee(draft), known, held_out, CONFIG).best_score > 3.0
    samples = cyclic_samples(32, 5)
    changed, measured = dataset_of(shifted, samples), dataset_of(shifted, cyclic_samples(6, 5, seed=3))
    private = PrivateModule.initialised(draft.config.private_config(32, 4)).to("cuda")
    report = train(private_trainee(draft, private), changed, measured, CONFIG)
    assert report.best_score > report.first_score
    train(lora_trainee(draft, 4), changed, measured, CONFIG)
    found = score_samples(FineTune("base", base), FineTune("shifted", shifted), draft, samples, SCORES)
    assert all(len(values) == 32 for values in found.values())
