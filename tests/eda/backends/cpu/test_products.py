"""Products with weights of 16, 8 and 4 bits, by every kind of instructions that this processor has."""

import pytest
import torch
from torch import Tensor

from eda.backends.cpu.library import instruction_set
from eda.backends.cpu.target import run_head
from eda.backends.cpu.weights import WEIGHT_FORMATS, PackedWeight, WeightFormat
from eda.formats.quantised import GROUP, QuantisedWeight, quantised
from tests.support.instructions import NAMES, build_for

pytestmark = pytest.mark.usefixtures("_needs_kernels")

SHAPES = [(64, 32), (85, 96), (200, 512), (16, 160)]


def random_weight(format: str, outputs: int, inputs: int, *, symmetric: bool = False) -> QuantisedWeight:
    """Every step that a file may hold; scales of very different sizes."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    low, high, dtype = (-128, 128, torch.int8) if format == "int8" else (0, 16, torch.uint8)
    steps = torch.randint(low, high, (outputs, inputs), generator=generator, dtype=dtype)
    sizes = torch.logspace(-4, 1, outputs)[:, None]
    scales = (torch.rand(outputs, inputs // GROUP, generator=generator) * sizes).half()
    if format == "int8":
        return QuantisedWeight("int8", steps, scales, None)
    minimums = torch.randn(outputs, inputs // GROUP, generator=generator) * sizes
    return QuantisedWeight("int4", steps, scales, scales * -8 if symmetric else minimums.half())


def random_inputs(rows: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    given = torch.randn(rows, inputs, generator=generator) * torch.logspace(-2, 2, inputs)
    given[0, : GROUP // 2] = 0.0
    if rows > 1:
        given[1, :GROUP] = 0.0
    return given.bfloat16()


def rounded_inputs(given: Tensor) -> Tensor:
    """Each group of 32 in steps of a 127th of its largest, float64; written out without the code under test."""
    groups = given.float().view(given.shape[0], -1, GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    steps = torch.where(most > 0, groups * (torch.full_like(most, 127.0) / most), 0.0).round()
    return (steps.double() * (most / 127.0).double()).view(given.shape)


def exact_values(weight: QuantisedWeight) -> Tensor:
    """In float64, written out without the code under test."""
    n, k = weight.shape
    values = weight.steps.double().view(n, -1, GROUP) * weight.scales.double()[..., None]
    if weight.minimums is not None:
        values = values + weight.minimums.double()[..., None]
    return values.view(n, k)


def sizes_of(weight: QuantisedWeight) -> Tensor:
    """What a value is the sum of, without signs."""
    parts = [QuantisedWeight(weight.format, weight.steps.short().abs(), weight.scales, None)]
    if weight.minimums is not None:
        parts.append(
            QuantisedWeight(weight.format, torch.ones_like(weight.steps), weight.minimums.abs(), None)
        )
    return torch.stack([part.dequantised().double() for part in parts]).sum(0)


def check_close(found: Tensor, given: Tensor, weight: Tensor, sizes: Tensor) -> None:
    """Errors relative to what is summed, since an output's terms may cancel out."""
    size = (given.abs() @ sizes.T).clamp(min=1e-30)
    assert ((found - given @ weight.double().T).abs() / size).max() < 2e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13])
def test_products_of_integers(name: str, rows: int) -> None:
    with build_for(name):
        for outputs, inputs in SHAPES:
            given = random_inputs(rows, inputs)
            for weight in (
                random_weight("int8", outputs, inputs),
                random_weight("int4", outputs, inputs),
                random_weight("int4", outputs, inputs, symmetric=True),
            ):
                found = run_head(PackedWeight(weight), given, outputs)
                check_close(found, rounded_inputs(given), exact_values(weight), sizes_of(weight))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13])
def test_products_of_bfloat16(name: str, rows: int) -> None:
    with build_for(name):
        for outputs, inputs in [*SHAPES, (33, 46)]:
            given = random_inputs(rows, inputs)
            weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
            found = run_head(PackedWeight(weight), given, outputs)
            check_close(found, given.double(), weight, weight.double().abs())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_that_integers_can_meet(name: str, sign: int) -> None:
    """All steps at their ends: what saturates, or wraps around, does it here. The results are whole and exact."""
    given = torch.full((5, 512), 127.0 * sign).bfloat16()
    ones = torch.ones(64, 512 // GROUP).half()
    with build_for(name):
        for step in (-128, 127):
            weight = QuantisedWeight("int8", torch.full((64, 512), step, dtype=torch.int8), ones, None)
            assert (run_head(PackedWeight(weight), given, 64) == sign * step * 127.0 * 512).all()
        for step in (0, 15):
            steps = torch.full((64, 512), step, dtype=torch.uint8)
            for minimum in (-8, -3):
                weight = QuantisedWeight("int4", steps, ones, ones * minimum)
                found = run_head(PackedWeight(weight), given, 64)
                assert (found == sign * (step + minimum) * 127.0 * 512).all()


@pytest.mark.parametrize("name", NAMES[1:])
def test_all_instructions_give_the_bits_of_plain_cpp(name: str) -> None:
    """But for bfloat16 where the processor multiplies it itself."""
    weights: list[Tensor | QuantisedWeight] = [
        random_weight("int8", 85, 96),
        random_weight("int4", 85, 96),
        random_weight("int4", 85, 96, symmetric=True),
        torch.randn(85, 96, generator=torch.Generator().manual_seed(2)).bfloat16(),
    ]
    given = random_inputs(9, 96)
    with build_for("scalar"):
        assert instruction_set() == "scalar"
        expected = [run_head(PackedWeight(weight), given, 85) for weight in weights]
    with build_for(name):
        has_products = "bf16" in (instruction_set() or "")
        found = [run_head(PackedWeight(weight), given, 85) for weight in weights]
    for one, other in zip(found[: 3 if has_products else 4], expected, strict=not has_products):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_a_row_alone_and_among_others(name: str, format: WeightFormat) -> None:
    weight = torch.randn(150, 192, generator=torch.Generator().manual_seed(3))
    given = random_inputs(17, 192)
    with build_for(name):
        packed = PackedWeight(weight, format=format)
        whole = run_head(packed, given, 150)
        for rows in (1, 2, 3, 4, 5, 6, 7, 11):
            parts = [run_head(packed, part, 150) for part in given.split(rows)]
            assert torch.equal(torch.cat(parts), whole)


def test_tensors_are_rounded_as_they_are_elsewhere() -> None:
    """Inputs that fill no group get zeros behind them."""
    weight = torch.randn(70, 80, generator=torch.Generator().manual_seed(4))
    given = random_inputs(3, 80)
    padded = torch.nn.functional.pad(weight, (0, 16))
    for format in ("int8", "int4"):
        found = run_head(PackedWeight(weight, format=format), given, 70)
        whole = quantised(padded, format)
        assert torch.equal(found, run_head(PackedWeight(whole), torch.nn.functional.pad(given, (0, 16)), 70))


def test_minimums_that_follow_from_the_scales_are_not_read() -> None:
    symmetric = PackedWeight(random_weight("int4", 64, 64, symmetric=True))
    assert symmetric.num_bytes == 64 * 64 * 4.5 / 8
    assert PackedWeight(random_weight("int4", 64, 64)).num_bytes == 64 * 64 * 5 / 8
