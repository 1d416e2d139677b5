"""Where training runs, and in which precision: chosen at run time, and logged with the losses."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from eda.models.target import automatic_dtype


@dataclass(frozen=True)
class Hardware:
    """The choices that depend on the machine."""

    device: str
    compute_dtype: str  # of matrix products; parameters and optimiser state are float32 either way
    compiled: bool
    num_threads: int

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which a forward pass uses `compute_dtype`."""
        if self.compute_dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, dtype=getattr(torch, self.compute_dtype))

    def compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function`, compiled where that is possible."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    def describe(self) -> dict[str, object]:
        """The choices and the library version, for the log."""
        return {**asdict(self), "torch": torch.__version__}


def choose_hardware(
    device: str = "auto", dtype: str = "auto", compiled: bool | None = None, num_threads: int = 0
) -> Hardware:
    """Pick what is fastest here; `"auto"`, `None` and 0 leave a choice open.

    bfloat16 pays only with units for it (see `automatic_dtype`). Compilation needs a C++ compiler.
    """
    if num_threads:
        torch.set_num_threads(num_threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        fast_bfloat16 = automatic_dtype(device) is torch.bfloat16
        dtype = "bfloat16" if fast_bfloat16 else "float32"
    if compiled is None:
        compiled = device == "cuda" or any(shutil.which(name) for name in ("g++", "clang++"))
    return Hardware(device, dtype, compiled, torch.get_num_threads())
