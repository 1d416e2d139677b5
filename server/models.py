"""Loading a server's models onto a device."""

import torch

from eda.draft import DraftModel
from eda.speculative import SpeculativeDecoder
from eda.target import TargetModel
from server.model_paths import ModelPaths
from server.settings import ConfigurationError


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one. Raises ``ConfigurationError`` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(
            f"device is {name!r}; it must be auto, cpu, cuda or cuda:<number>"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device is {name!r}; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device


def load_pair(paths: ModelPaths, device: torch.device, dtype: str) -> tuple[TargetModel, DraftModel | None]:
    """Target and draft in the same type. Raises ``eda.errors.CheckpointError`` and its kinds."""
    wanted = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    target = TargetModel.load(paths.target, dtype=wanted, device=device)
    draft = None
    if paths.draft is not None:
        draft = DraftModel.load(paths.draft, dtype=target.dtype, device=device)
    return target, draft


def num_cache_slots(
    target: TargetModel, draft: DraftModel | None, *, cache_mib: int, max_model_len: int, max_running: int
) -> int:
    """Cache slots that ``cache_mib`` MiB hold, and no more than ``max_running`` longest sequences need.

    Raises ``ConfigurationError`` when not even one sequence fits.
    """
    per_slot = SpeculativeDecoder.bytes_per_slot(target, draft)
    room_for_drafts = 64
    longest = max_model_len + room_for_drafts
    slots = min(cache_mib * 1024 * 1024 // per_slot, max_running * longest)
    if slots < longest:
        needed = -(-longest * per_slot // (1024 * 1024))
        raise ConfigurationError(
            f"cache_mib is {cache_mib}; one sequence of {max_model_len} tokens needs {needed}. Raise it or lower "
            "max_model_len"
        )
    return int(slots)
