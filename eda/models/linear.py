"""Linear layers that can be laid out for the CPU's matrix kernels once they are frozen.

A pass over a few tokens is bound by reading the weights. Multiplied from plain rows, eight tokens take two to three
times as long as one; from oneDNN's blocked layout, which compiled models use too, whole passes over 2 to 16 tokens
took two thirds of that on a CPU with AVX2, and one token took the same. Verifying a draft is such a pass, so this
decides how much speculation gains on a CPU.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from eda.formats.quantised import QuantisedWeight


class Linear(nn.Linear):
    """``nn.Linear`` with ``pack``, or with a quantised weight."""

    packed: Tensor | None = None
    quantised: QuantisedWeight | None = None
    """Stands in for ``weight``, which is gone then."""

    def quantise(self, weight: QuantisedWeight) -> None:
        """Takes a quantised weight in the place of its own, for the passes that multiply such weights."""
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"a quantised weight of {list(weight.shape)} does not fit a layer of "
                f"{[self.out_features, self.in_features]}"
            )
        self.quantised = weight
        del self.weight

    def pack(self) -> None:
        """Trades the weight for a packed one where ``packed_weight`` gives one. Not for layers that are trained
        or saved: ``weight`` is gone afterwards."""
        packed = packed_weight(self.weight)
        if packed is not None:
            self.packed = packed
            del self.weight

    def forward(self, input: Tensor) -> Tensor:
        if self.quantised is not None:
            return functional.linear(input, self.quantised.dequantised().to(input.dtype), self.bias)
        if self.packed is None:
            return functional.linear(input, self.weight, self.bias)
        return packed_linear(input, self.packed, self.out_features, self.bias)


def packed_weight(weight: Tensor) -> Tensor | None:
    """``weight`` ``[out, in]`` in oneDNN's own layout, for ``packed_linear`` only.

    ``None`` where that has not been measured to be faster or is not available: other devices than the CPU, other
    types than float32, builds without oneDNN.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def packed_linear(given: Tensor, packed: Tensor, out_size: int, bias: Tensor | None = None) -> Tensor:
    """``given`` ``[T, in]`` times a packed weight: ``[T, out_size]``."""
    if given.shape[0] == 0:  # the kernel has no empty products
        return given.new_empty(0, out_size)
    output: Tensor = torch.ops.mkldnn._linear_pointwise(given.contiguous(), packed, bias, "none", [], "")
    return output
