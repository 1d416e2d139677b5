"""Weights of 8 and 4 bits in groups of 32 inputs, as GGUF's Q8_0, Q4_0 and Q4_1 hold them.

A value is ``scale * step + minimum``, both of the group that its input belongs to. Scales and minimums are float16 as
in those formats, so a file's own weights are kept exactly.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

GROUP = 32
"""Inputs that share a scale."""

Format = Literal["int8", "int4"]


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """A weight ``[n, k]``; ``k`` is a multiple of ``GROUP``."""

    format: Format
    steps: Tensor
    """``[n, k]``: int8 from -127 to 127 (files may hold -128), or uint8 from 0 to 15, one a byte, for ``int4``."""
    scales: Tensor
    """float16 ``[n, k / GROUP]``."""
    minimums: Tensor | None
    """float16 ``[n, k / GROUP]`` for ``int4``; ``None`` for ``int8``, which is symmetric."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.steps.shape[0], self.steps.shape[1]

    def rows(self, index: Tensor | slice) -> "QuantisedWeight":
        """The outputs at ``index``, in that order."""
        minimums = None if self.minimums is None else self.minimums[index]
        return QuantisedWeight(self.format, self.steps[index], self.scales[index], minimums)

    def in_format(self, format: Format) -> tuple["QuantisedWeight", bool]:
        """These values in ``format``, and whether they are still the same ones.

        They are where the format stays, and where 4 bits that are symmetric about their eighth step become 8 bits.
        """
        if format == self.format:
            return self, True
        if format == "int8" and self.is_symmetric:
            return QuantisedWeight("int8", self.steps.view(torch.int8) - 8, self.scales, None), True
        return quantised(self.dequantised(), format), False

    @property
    def is_symmetric(self) -> bool:
        """Whether the minimums say no more than the scales, as in GGUF's Q4_0."""
        return self.minimums is None or torch.equal(self.minimums, self.scales * -8)

    def dequantised(self) -> Tensor:
        """The values, float32 ``[n, k]``."""
        n, k = self.shape
        values = self.steps.view(n, k // GROUP, GROUP) * self.scales.float()[..., None]
        if self.minimums is not None:
            values = values + self.minimums.float()[..., None]
        return values.view(n, k)


def concatenated(weights: list[QuantisedWeight]) -> QuantisedWeight:
    """The outputs of all ``weights``, one after the other. They have one format and as many inputs."""
    minimums = [weight.minimums for weight in weights if weight.minimums is not None]
    return QuantisedWeight(
        weights[0].format,
        _joined([weight.steps for weight in weights]),
        _joined([weight.scales for weight in weights]),
        _joined(minimums) if minimums else None,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    # Not torch.cat: see eda/formats/gguf_file/checkpoint.py on threads.
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))


def quantised(weight: Tensor, format: Format) -> QuantisedWeight:
    """``weight [n, k]`` rounded to the nearest step of each group; ``k`` must be a multiple of ``GROUP``."""
    n, k = weight.shape
    if k % GROUP:
        raise ValueError(f"a weight of {k} inputs has no whole groups of {GROUP}")
    groups = weight.detach().float().view(n, k // GROUP, GROUP)
    if format == "int8":
        scales = (groups.abs().amax(-1) / 127).half()
        steps = (groups * _inverse(scales)[..., None]).round().clamp(-127, 127)
        return QuantisedWeight(format, steps.to(torch.int8).view(n, k), scales, None)
    low, high = groups.aminmax(dim=-1)
    scales, minimums = ((high - low) / 15).half(), low.half()
    steps = ((groups - minimums.float()[..., None]) * _inverse(scales)[..., None]).round().clamp(0, 15)
    return QuantisedWeight(format, steps.to(torch.uint8).view(n, k), scales, minimums)


def _inverse(scales: Tensor) -> Tensor:
    values = scales.float()
    return torch.where(values == 0, 0.0, 1.0 / values)
