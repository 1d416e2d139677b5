"""What is kept for fine-tunes goes with them."""

import gc
from pathlib import Path

import pytest
import torch

from eda.backends.loading import load_fine_tune, load_target
from eda.models.fine_tune import FineTune, FineTuneCache
from eda.models.target import TargetModel
from tests.support.tiny import tiny_lora, tiny_target


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_target(tmp_path / "base")


@pytest.fixture
def model(base: Path) -> TargetModel:
    return load_target(base, weights="float32")


def test_fine_tunes_with_one_output_layer_share_what_is_made_of_it(
    base: Path, model: TargetModel, tmp_path: Path
) -> None:
    made: list[str] = []
    cache = FineTuneCache(lambda fine_tune: made.append(fine_tune.name) or len(made))
    layers_only = load_fine_tune(tiny_lora(tmp_path / "layers", base), model, "layers")
    own_head = load_fine_tune(
        tiny_lora(tmp_path / "head", base, targets=("q_proj", "lm_head")), model, "head"
    )
    for fine_tune in (FineTune("base", model), layers_only, own_head, own_head):
        cache(fine_tune)
    assert made == ["base", "head"]
    assert cache(layers_only) == 1
    assert cache(own_head) == 2


def test_what_was_made_for_an_unloaded_fine_tune_is_forgotten(base: Path, tmp_path: Path) -> None:
    cache = FineTuneCache(lambda fine_tune: fine_tune.head_rows(torch.tensor([1, 2])))
    fine_tune = FineTune("base", load_target(base, weights="float32"))
    cache(fine_tune)
    assert len(cache) == 1
    del fine_tune
    gc.collect()
    assert len(cache) == 0
