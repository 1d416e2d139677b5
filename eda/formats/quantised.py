"""Weights of 8 and 4 bits in groups of 32 inputs, as GGUF's Q8_0, Q4_0 and Q4_1 hold them.

A value is ``scale * step + minimum``, both of the group that its input belongs to. Scales and minimums are float16 as
in those formats, so a file's own weights are kept exactly.
"""

from dataclasses import dataclass
from typing import Literal

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

    def rows(self, index: Tensor) -> "QuantisedWeight":
        """The outputs at ``index``, in that order."""
        minimums = None if self.minimums is None else self.minimums[index]
        return QuantisedWeight(self.format, self.steps[index], self.scales[index], minimums)

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
        torch.cat([weight.steps for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        torch.cat(minimums) if minimums else None,
    )


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
