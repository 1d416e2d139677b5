"""Weights of 7 bits: what they are rounded to, and products with them."""

import ctypes

import pytest
import torch
from torch import Tensor

from eda.kernels.target import run_head
from eda.kernels.weights import PackedWeight
from tests.support.drafting import Rounds, draft_config
from tests.support.narrow import mean_error

pytestmark = pytest.mark.usefixtures("_needs_kernels")


def rounded(weight: Tensor) -> Tensor:
    """Each output's values as multiples of a 63rd of its largest, written out without the code under test."""
    step = weight.float().abs().max(dim=1, keepdim=True).values / 63
    return torch.where(step > 0, (weight.float() / step).round() * step, 0.0)


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (85, 48), (16, 2), (200, 514)])
@pytest.mark.parametrize("rows", [1, 5, 7, 13])
def test_a_product_is_the_one_with_rounded_weights(outputs: int, inputs: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(outputs + rows)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-3, 2, outputs)[:, None]
    weight[outputs // 2] = 0.0
    given = torch.randn(rows, inputs, generator=generator).bfloat16() + 0.5
    found = run_head(PackedWeight(weight, quantised=True), given, outputs)
    expected = given.double() @ rounded(weight).double().T
    # Relative to what was summed: an output's values may cancel out.
    size = (given.double().abs() @ rounded(weight).double().abs().T).clamp(min=1e-30)
    assert ((found - expected).abs() / size).max() < 1e-5
    assert (found[:, outputs // 2] == 0.0).all()


def test_an_output_of_one_value_is_exact() -> None:
    weight = torch.zeros(64, 32)
    weight[torch.arange(64), torch.arange(64) % 32] = torch.linspace(-3.0, 3.0, 64)
    found = run_head(PackedWeight(weight, quantised=True), torch.eye(32).bfloat16(), 64)
    torch.testing.assert_close(found, weight.T, rtol=1e-5, atol=1e-5)


def test_quantised_weights_take_half_the_memory() -> None:
    weight = torch.randn(128, 64)
    sizes = [PackedWeight(weight, quantised=quantised).data.nbytes for quantised in (False, True)]
    assert sizes == [128 * 64 * 2, 128 * 64]
    packed = PackedWeight(weight, quantised=True)
    assert ctypes.string_at(packed.struct.data, 4) == bytes(packed.data.flatten()[:4].tolist())


def test_a_quantised_draft_stays_close_to_the_exact_one() -> None:
    rounds = Rounds(draft_config(hidden_size=96, intermediate_size=128), quantised=True)
    part = rounds.part(rounds.extents(1)[0], 13)
    with torch.inference_mode():
        found = rounds.extend([part])[0]
        exact = rounds.extend_on_torch([part], rounds.wide)
        narrow = rounds.extend_on_torch([part], rounds.narrow)
    error = mean_error([found], [exact])
    assert mean_error([narrow], [exact]) < error < 0.1  # it is rounded at all, and not by much
