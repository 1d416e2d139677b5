"""Packed linear layers give what plain ones give."""

import pytest
import torch

from eda.models.linear import Linear, packed_linear, packed_weight

needs_packing = pytest.mark.skipif(
    packed_weight(torch.ones(2, 2)) is None, reason="this build has no oneDNN to pack for"
)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 7, 60])
def test_a_packed_layer_equals_the_plain_one(tokens: int, bias: bool) -> None:
    torch.manual_seed(tokens)
    layer = Linear(33, 50, bias=bias).requires_grad_(False)
    given = torch.randn(tokens, 33)
    expected = layer(given)
    layer.pack()
    assert layer.packed is not None
    with torch.inference_mode():
        found = layer(given)
    assert found.shape == (tokens, 50)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_packing
def test_strided_rows_are_taken_as_they_are() -> None:
    weight, given = torch.randn(20, 16), torch.randn(8, 32)[::2, :16]
    packed = packed_weight(weight)
    assert packed is not None
    torch.testing.assert_close(packed_linear(given, packed, 20), given @ weight.T, rtol=1e-5, atol=1e-5)


def test_other_types_stay_plain() -> None:
    layer = Linear(8, 8).bfloat16()
    layer.pack()
    assert layer.packed is None
    assert layer.weight.shape == (8, 8)
