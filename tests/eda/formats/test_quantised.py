"""Weights in groups: what rounding may lose, and the order of rows."""

import pytest
import torch

from eda.formats.quantised import GROUP, Format, concatenated, quantised


@pytest.mark.parametrize(("format", "steps"), [("int8", 254), ("int4", 15)])
def test_a_value_is_off_by_half_a_step_at_most(format: Format, steps: int) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    rounded = quantised(weight, format).dequantised()
    groups = weight.view(24, 3, GROUP)
    span = 2 * groups.abs().amax(-1) if format == "int8" else groups.amax(-1) - groups.amin(-1)
    # Scales are float16: half a step, and what rounding them moves the far end by.
    allowed = span / steps * 0.5 + 2e-3 * groups.abs().amax(-1)
    assert ((rounded - weight).view(24, 3, GROUP).abs().amax(-1) <= allowed).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rows_and_concatenation_keep_values(format: Format) -> None:
    weight = quantised(torch.randn(8, 64), format)
    index = torch.tensor([3, 1])
    assert torch.equal(weight.rows(index).dequantised(), weight.dequantised()[index])
    both = concatenated([weight, weight.rows(index)])
    assert torch.equal(both.dequantised(), torch.cat([weight.dequantised(), weight.dequantised()[index]]))


def test_groups_of_zeros_and_of_one_value() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 0.5
    for format in ("int8", "int4"):
        assert torch.allclose(quantised(weight, format).dequantised(), weight, atol=1e-3)


def test_inputs_without_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="33 inputs has no whole groups of 32"):
        quantised(torch.zeros(2, 33), "int8")
