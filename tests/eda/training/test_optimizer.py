"""Muon's update against torch's own, and which type its products are in."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eda.training.learning import precision
from eda.training.learning.optimizer import MuonAdamW, orthogonalised
from eda.training.learning.trainees import shared_trainee
from eda.training.learning.trainer import TrainingConfig, train
from tests.support.toys import dataset_of, new_draft, random_samples, random_target

SHAPES = {"wide": (12, 40), "tall": (40, 12), "alike": (12, 40), "square": (16, 16)}
RATE, DECAY = 0.03, 0.1


@pytest.fixture
def slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "automatic_dtype", lambda device: torch.float32)


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def torch_muon(own: dict[str, nn.Parameter]) -> torch.optim.Muon:
    return torch.optim.Muon(own.values(), lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")


def give(own: dict[str, nn.Parameter], seed: int) -> None:
    for name, gradient in gradients(seed).items():
        own[name].grad = gradient


def test_steps_in_float32_are_those_of_torch(slow_bfloat16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon knows bfloat16 only; with the conversion taken out it iterates in float32, too."""
    ours, theirs = parameters(), parameters()
    optimizer, reference = MuonAdamW(ours, RATE, DECAY), torch_muon(theirs)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for seed in range(3):
        give(ours, seed)
        give(theirs, seed)
        optimizer.step(RATE)
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torch_but_for_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "automatic_dtype", lambda device: dtype)
    ours, theirs, before = parameters(), parameters(), parameters()
    optimizer, reference = MuonAdamW(ours, RATE, DECAY), torch_muon(theirs)
    give(ours, 1)
    give(theirs, 1)
    optimizer.step(RATE)
    reference.step()
    for name, parameter in ours.items():
        wanted = theirs[name] - before[name]
        assert (parameter - theirs[name]).norm() < 0.02 * wanted.norm(), name


def test_a_state_of_torchs_muon_is_gone_on_from(slow_bfloat16: None) -> None:
    theirs, ours = parameters(), parameters()
    reference = torch_muon(theirs)
    give(theirs, 1)
    reference.step()
    kept = {
        f"momentum_buffer.{name}": reference.state[p]["momentum_buffer"].clone() for name, p in theirs.items()
    }
    optimizer = MuonAdamW(ours, RATE, DECAY)
    optimizer.load(kept, step=1)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    for own in (ours, theirs):
        give(own, 2)
    optimizer.step(RATE)
    reference.step()
    assert set(optimizer.state()) == set(kept)
    for name, parameter in ours.items():
        assert (parameter - theirs[name]).norm() < 0.02 * (theirs[name] - before[name]).norm(), name


def test_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(3, 24, 60, generator=generator) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ orthogonalised(matrices) @ right.mT  # diagonal where singular vectors are kept
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


class _Products(TorchDispatchMode):
    """Notes the types of what is multiplied."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "linear", "mv", "_scaled_dot_product")

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__.startswith(self.NAMES):
            self.dtypes |= {value.dtype for value in args if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_no_product_of_a_training_run_is_in_a_slow_type(
    fast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a target whose weights are bfloat16; its own passes, made before, are not training's business."""
    monkeypatch.setattr(precision, "automatic_dtype", lambda device: fast)
    target = random_target().to(torch.bfloat16)
    data = dataset_of(target, random_samples(8))
    data.states.get(data.usable)
    config = TrainingConfig(num_steps=2, batch_size=4, evaluate_every=1)
    trainee = shared_trainee(new_draft(target))
    with _Products() as products:
        train(trainee, data, data, config)
    assert (torch.bfloat16 in products.dtypes) == (fast == torch.bfloat16)
    assert torch.float32 in products.dtypes
