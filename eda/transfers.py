"""Moving small values between host and device without making the host wait where it need not."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(
    values: Sequence[float] | Sequence[Sequence[float]],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.tensor(values)`` on ``device``. To a GPU from pinned memory, so that nobody waits for the copy."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def read(*tensors: Tensor) -> list[list[list[float]]]:
    """Each tensor ``[B, n]`` as nested lists, integers as whole floats; one wait for all of them.

    Raises ``ValueError`` where the tensors have different ``B``. Exact for integers below 2**53 and for float32.
    """
    if len({tensor.shape[0] for tensor in tensors}) != 1:
        raise ValueError(f"tensors of {[tensor.shape[0] for tensor in tensors]} rows cannot be read together")
    widths = [tensor.shape[1] for tensor in tensors]
    rows: list[list[float]] = torch.cat([tensor.double() for tensor in tensors], dim=1).tolist()
    parts: list[list[list[float]]] = []
    start = 0
    for width in widths:
        parts.append([row[start : start + width] for row in rows])
        start += width
    return parts
