"""How large the key/value cache is, and how long a sequence may be in it."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from eda.decoder import SpeculativeDecoder
from eda.models.draft import DraftModel
from eda.models.target import TargetModel
from eda.server.settings import ConfigurationError, Settings

MIB = 1024 * 1024
DEFAULT_CACHE_BYTES = 1024 * MIB
"""What the cache takes by default, unless one longest sequence needs more."""
MEMORY_SHARE = 0.5
"""Of the free memory, at most, where nobody says how large the cache is to be."""
DRAFT_ROOM = 64
"""Slots that a sequence may need for its drafts."""
SHORTEST_USEFUL = 256
"""Tokens of a sequence; a cache that holds no more is refused for a model that could take longer ones."""
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class CacheSize:
    """``max_model_len``: tokens of the longest sequence, at most the model's own."""

    num_slots: int
    num_bytes: int
    max_model_len: int


def choose_cache_size(
    settings: Settings, target: TargetModel, draft: DraftModel | None, *, free_bytes: int
) -> CacheSize:
    """The cache that ``settings`` ask for or, where they leave it open, what fits into ``free_bytes`` of memory.

    It has no more slots than ``max_running`` longest sequences need. When the model's longest sequence does not fit,
    sequences are limited to what does; only a ``max_model_len`` that somebody set is never lowered.

    Raises ``ConfigurationError`` when that one does not fit, or next to nothing does.
    """
    own = target.config.max_position_embeddings
    wanted = min(settings.max_model_len or own, own)
    per_slot = SpeculativeDecoder.bytes_per_slot(target, draft)
    needed = (wanted + DRAFT_ROOM) * per_slot
    if settings.cache_mib is not None:
        budget, source = settings.cache_mib * MIB, f"cache_mib is {settings.cache_mib}"
    else:
        budget = min(max(DEFAULT_CACHE_BYTES, needed), int(MEMORY_SHARE * free_bytes))
        source = f"half of the free memory is {budget // MIB} MiB"
    num_slots = min(budget // per_slot, settings.max_running * (wanted + DRAFT_ROOM))
    fitting = min(wanted, num_slots - DRAFT_ROOM)
    least = wanted if settings.max_model_len is not None else min(wanted, SHORTEST_USEFUL)
    if fitting < least:
        least_mib = -(-(least + DRAFT_ROOM) * per_slot // MIB)
        raise ConfigurationError(
            f"{source}; one sequence of {least} tokens needs {least_mib} MiB of cache. Raise cache_mib"
            + (" or lower max_model_len" if settings.max_model_len is not None else "")
        )
    return CacheSize(num_slots, num_slots * per_slot, fitting)


def free_memory(device: torch.device, cgroup: Path = _CGROUP) -> int:
    """Bytes that this process may still take on ``device``; for a CPU also by the limit of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(available, int(limit) - int(used))
    except (OSError, ValueError):  # no such limit: the file says "max" then
        return available
