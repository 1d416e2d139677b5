"""Weights laid out for the C++ passes."""

import ctypes

import torch
from torch import Tensor

from eda.kernels.library import LowRank, Packed

LANES = 16
TILES = 4
BLOCK = LANES * TILES
"""Outputs in one block of an ordinary weight."""
MIDDLE, LARGEST = 64, 63
"""Of quantised weights: the byte that stands for 0, and the most steps away from it."""


class PackedWeight:
    """A weight ``[n, k]`` in blocks of ``16 * tiles`` outputs; keeps the memory that ``struct`` points to.

    In bfloat16, or ``quantised`` to 7 bits with a scale for each output.
    """

    def __init__(self, weight: Tensor, tiles: int = TILES, *, quantised: bool = False) -> None:
        block = LANES * tiles
        outputs, inputs = _rounded(weight.shape[0], block), _rounded(weight.shape[1], 2)
        padded = torch.zeros(outputs, inputs, dtype=torch.float32 if quantised else torch.bfloat16)
        padded[: weight.shape[0], : weight.shape[1]] = weight.detach()
        self._scales: Tensor | None = None
        if quantised:
            self._scales = padded.abs().amax(1) / LARGEST
            steps = padded / self._scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            padded = (steps.round() + MIDDLE).to(torch.uint8)
        blocks = padded.view(outputs // block, block, inputs // 2, 2)
        self.data = blocks.permute(0, 2, 1, 3).contiguous()
        scales = 0 if self._scales is None else self._scales.data_ptr()
        self.struct = Packed(self.data.data_ptr(), outputs, inputs, tiles, 0, scales)

    @property
    def pointer(self) -> int:
        """Address of the structure, for fields that point to it."""
        return ctypes.addressof(self.struct)


def packed_gate_up(gate_up: Tensor, intermediate_size: int, *, quantised: bool = False) -> PackedWeight:
    """Gates and ups ``[2 * intermediate_size, k]`` interleaved: half a block of gates, then their partners."""
    half = BLOCK // 2
    size = _rounded(intermediate_size, half)
    parts = gate_up.new_zeros(2, size, gate_up.shape[1])
    parts[:, :intermediate_size] = gate_up.detach().view(2, intermediate_size, -1)
    blocks = parts.view(2, size // half, half, -1).transpose(0, 1)
    return PackedWeight(blocks.reshape(2 * size, -1), quantised=quantised)


def padded_intermediate(intermediate_size: int) -> int:
    """Width of the inner activations that ``packed_gate_up`` gives."""
    return _rounded(intermediate_size, BLOCK // 2)


class PackedLowRank:
    """``b @ a`` of a fused matrix: ``a [r, in]``, ``b [out, r]``."""

    def __init__(self, a: Tensor, b: PackedWeight) -> None:
        self.a = PackedWeight(a, tiles=1)
        self.b = b
        self.struct = LowRank(self.a.struct, b.struct)


def float_vector(vector: Tensor, size: int | None = None) -> Tensor:
    """A norm's weight or a bias in float32, zeros behind it up to ``size``."""
    plain = vector.detach().float().contiguous()
    if size is None or size == plain.numel():
        return plain
    return torch.nn.functional.pad(plain, (0, size - plain.numel()))


def _rounded(value: int, step: int) -> int:
    return -(-value // step) * step
