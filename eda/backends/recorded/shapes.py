"""The fixed shapes that passes are rounded up to, and the buffers that hold their inputs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ROWS = (1, 2, 4, 8, 16)
"""Sequences of one pass."""
QUERIES = (1, 2, 3, 4, 5, 6, 8, 12, 17, 24, 33)
"""Tokens of each sequence in a target pass: the last known one and a chain or tree."""
EXTENSIONS = (8, 32)
"""Features of each sequence that the draft reads at once."""
CHAINS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
"""Lengths of chains."""
SMALLEST_KEYS = 256
"""Keys of each row are rounded up to this number times a power of two."""
WARM_UP_KEYS = (SMALLEST_KEYS, 2 * SMALLEST_KEYS)
"""Recorded before the first request; longer sequences are recorded when they come."""
MAX_TOKENS = 68
"""Tokens of a pass, padding included; so many cache slots are kept for tokens that only pad."""
MAX_KEYS = 16_384
"""Rows times keys of a pass: each row's keys are copied to one place, which stops paying in large batches."""


def round_up(value: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the rising ``sizes`` that is not below ``value``; ``None`` when there is none."""
    return next((size for size in sizes if size >= value), None)


def num_keys(longest: int, num_rows: int) -> int | None:
    """Keys of each row where the longest row has ``longest``; ``None`` for more than ``MAX_KEYS`` in all."""
    size = SMALLEST_KEYS
    while size < longest:
        size *= 2
    return size if size * num_rows <= MAX_KEYS else None


class Inputs:
    """Named int64 tensors on the device that one copy fills.

    Args:
        shapes: by name. The tensors are views of one buffer, which keeps its place for ever.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self._buffer = torch.zeros(sum(self._sizes.values()), dtype=torch.int64, device=device)
        parts: Sequence[Tensor] = torch.split(self._buffer, list(self._sizes.values()))
        self._views = {
            name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        view: Tensor = self._views[name]
        return view

    def load(self, values: Mapping[str, Sequence[int]]) -> None:
        """Fills the buffer. ``values`` holds all names; lists that are too short are filled up with zeros.

        Raises ``ValueError`` for a list that is too long.
        """
        packed: list[int] = []
        for name, size in self._sizes.items():
            given = values[name]
            if len(given) > size:
                raise ValueError(f"{name} has {len(given)} values; the buffer takes {size}")
            packed += given
            packed += [0] * (size - len(given))
        on_gpu = self._buffer.device.type == "cuda"
        # Fresh pinned memory each time: the last copy may not have ended, and torch reuses blocks that have.
        host = torch.tensor(packed, dtype=torch.int64, pin_memory=on_gpu)
        self._buffer.copy_(host, non_blocking=True)
