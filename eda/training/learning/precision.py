"""Which type training multiplies in: the one place that answers it for every stage."""

from contextlib import AbstractContextManager, nullcontext

import torch

from eda.models.target import automatic_dtype


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware has units for it, else float32: emulated, it takes ten times as long."""
    return automatic_dtype(device)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products in ``product_dtype``; parameters and optimiser state stay float32."""
    dtype = product_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
