"""Weights laid out for the C++ passes."""

import ctypes
from typing import Literal

import torch
from torch import Tensor

from eda.backends.cpu.library import CLowRank, Packed
from eda.backends.cpu.memory import WeightMemory
from eda.formats.quantised import GROUP, QuantisedWeight, concatenated, quantised

WeightFormat = Literal["bfloat16", "int8", "int4"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("bfloat16", "int8", "int4")
"""In the order of ``Format`` in ``matrix.h``."""
LANES = 16
TILES = 4
BLOCK = LANES * TILES
"""Outputs in one block of an ordinary weight."""
_ROWS_AT_ONCE = 8192
"""Outputs that are quantised at once: float32 copies of a whole output head may not fit the memory."""


class PackedWeight:
    """A weight ``[n, k]`` in blocks of ``16 * tiles`` outputs; keeps the memory that ``struct`` points to.

    A tensor is rounded to ``format``. A quantised weight keeps its own format and values; such blocks have 4 tiles.
    What lives as long as a model does goes into a ``memory`` that it shares.
    """

    def __init__(
        self,
        weight: Tensor | QuantisedWeight,
        tiles: int = TILES,
        *,
        format: WeightFormat = "bfloat16",
        memory: WeightMemory | None = None,
    ) -> None:
        if isinstance(weight, Tensor) and format != "bfloat16":
            weight = _quantised(weight, format)
        self.scales: Tensor | None = None
        self.minimums: Tensor | None = None
        if isinstance(weight, Tensor):
            self.format: WeightFormat = "bfloat16"
            self.data = _bfloat16_blocks(weight, LANES * tiles)
            outputs, inputs = self.data.shape[0] * LANES * tiles, self.data.shape[1] * 2
        else:
            assert tiles == TILES
            self.format = weight.format
            self.data = _byte_blocks(weight) if weight.format == "int8" else _nibble_blocks(weight)
            self.scales = _group_blocks(weight.scales)
            if weight.minimums is not None and not weight.is_symmetric:
                self.minimums = _group_blocks(weight.minimums)
            outputs, inputs = self.data.shape[0] * BLOCK, self.data.shape[1] * GROUP
        if memory is not None:
            self.data = memory.hold(self.data)
            self.scales = None if self.scales is None else memory.hold(self.scales)
            self.minimums = None if self.minimums is None else memory.hold(self.minimums)
        pointers = [0 if part is None else part.data_ptr() for part in (self.scales, self.minimums)]
        place = WEIGHT_FORMATS.index(self.format)
        self.struct = Packed(self.data.data_ptr(), outputs, inputs, tiles, place, *pointers)

    @property
    def pointer(self) -> int:
        """Address of the structure, for fields that point to it."""
        return ctypes.addressof(self.struct)

    @property
    def num_bytes(self) -> int:
        """What a product reads."""
        parts = (self.data, self.scales, self.minimums)
        return sum(part.nbytes for part in parts if part is not None)


def _quantised(weight: Tensor, format: Literal["int8", "int4"]) -> QuantisedWeight:
    """Inputs are padded with zeros to whole groups."""
    padding = -weight.shape[1] % GROUP
    return concatenated(
        [
            quantised(torch.nn.functional.pad(part, (0, padding)), format)
            for part in torch.split(weight.detach(), _ROWS_AT_ONCE)
        ]
    )


def _bfloat16_blocks(weight: Tensor, block: int) -> Tensor:
    """``[blocks, pairs of inputs, block, 2]``."""
    outputs, inputs = _rounded(weight.shape[0], block), _rounded(weight.shape[1], 2)
    padded = torch.zeros(outputs, inputs, dtype=torch.bfloat16)
    padded[: weight.shape[0], : weight.shape[1]] = weight.detach()
    return padded.view(outputs // block, block, inputs // 2, 2).permute(0, 2, 1, 3).contiguous()


def _byte_blocks(weight: QuantisedWeight) -> Tensor:
    """``[blocks, groups, 8, BLOCK, 4]``: values + 128."""
    steps = _with_whole_blocks(weight.steps.view(torch.uint8) ^ 128)
    return steps.view(-1, BLOCK, weight.shape[1] // GROUP, 8, 4).permute(0, 2, 3, 1, 4).contiguous()


def _nibble_blocks(weight: QuantisedWeight) -> Tensor:
    """``[blocks, groups, 4, BLOCK, 4]``: low bits are of the first half of a group, high bits of the second."""
    steps = _with_whole_blocks(weight.steps)
    halves = steps.view(-1, BLOCK, weight.shape[1] // GROUP, 2, 4, 4).permute(3, 0, 2, 4, 1, 5)
    return (halves[0] | halves[1] << 4).contiguous()


def _group_blocks(values: Tensor) -> Tensor:
    """``[n, groups]`` to ``[blocks, groups, BLOCK]``; 0 for outputs that only fill a block."""
    padded = _with_whole_blocks(values)
    return padded.view(-1, BLOCK, values.shape[1]).transpose(1, 2).contiguous()


def _with_whole_blocks(rows: Tensor) -> Tensor:
    if rows.shape[0] % BLOCK == 0:
        return rows  # padding copies even where there is none
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % BLOCK))


def packed_gate_up(
    gate_up: Tensor | QuantisedWeight,
    intermediate_size: int,
    *,
    format: WeightFormat = "bfloat16",
    memory: WeightMemory | None = None,
) -> PackedWeight:
    """Gates and ups ``[2 * intermediate_size, k]`` interleaved: half a block of gates, then their partners."""
    half = BLOCK // 2
    size = padded_intermediate(intermediate_size)
    # Rows behind the last unit are zero: one more row, which all of them take.
    index = torch.full((2, size), 2 * intermediate_size)
    index[:, :intermediate_size] = torch.arange(2 * intermediate_size).view(2, intermediate_size)
    order = index.view(2, size // half, half).transpose(0, 1).reshape(-1)
    more = _one_more_row if size > intermediate_size else _as_they_are
    if isinstance(gate_up, Tensor):
        return PackedWeight(more(gate_up.detach())[order], format=format, memory=memory)
    minimums = None if gate_up.minimums is None else more(gate_up.minimums)
    parts = more(gate_up.steps), more(gate_up.scales), minimums
    return PackedWeight(QuantisedWeight(gate_up.format, *parts).rows(order), memory=memory)


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _one_more_row(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, 1))


def padded_intermediate(intermediate_size: int) -> int:
    """Width of the inner activations that ``packed_gate_up`` gives."""
    return _rounded(intermediate_size, BLOCK // 2)


class PackedLowRank:
    """``b @ a`` of a fused matrix, in bfloat16: ``a [r, in]``, ``b [out, r]``."""

    def __init__(self, a: Tensor, b: PackedWeight) -> None:
        self.a = PackedWeight(a, tiles=1)
        self.b = b
        self.struct = CLowRank(self.a.struct, b.struct)


def float_vector(vector: Tensor, size: int | None = None) -> Tensor:
    """A norm's weight or a bias in float32, zeros behind it up to ``size``."""
    plain = vector.detach().float().contiguous()
    if size is None or size == plain.numel():
        return plain
    return torch.nn.functional.pad(plain, (0, size - plain.numel()))


def _rounded(value: int, step: int) -> int:
    return -(-value // step) * step
