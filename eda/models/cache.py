"""Key/value cache: one preallocated pool of token slots, handed out in contiguous extents.

A sequence's largest possible length is known when it is admitted (prompt + max_tokens + room for one draft), so
it gets one contiguous extent for its life. Contiguity is what makes attention copy-free: a sequence's keys are a
view of the pool. Rolling back to an accepted length only moves a counter.
"""

from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eda.errors import CacheFullError


@dataclass(slots=True, eq=False)
class Extent:
    """A run of token slots that belongs to one sequence: slots ``start`` to ``start + capacity``."""

    start: int
    capacity: int
    length: int = 0
    """Tokens whose keys and values are valid, counted from ``start``."""


@dataclass(slots=True, eq=False)
class ExtentAllocator:
    """First-fit allocation of slot ranges; neighbouring free ranges are merged on release."""

    num_slots: int
    _free: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self._free = [(0, self.num_slots)]

    @property
    def num_free(self) -> int:
        return sum(size for _, size in self._free)

    def can_allocate(self, capacity: int) -> bool:
        return any(size >= capacity for _, size in self._free)

    def allocate(self, capacity: int) -> Extent:
        """Raises ``CacheFullError`` when no free range has ``capacity`` slots, ``ValueError`` for capacity < 1."""
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; an extent needs at least 1 slot")
        for index, (start, size) in enumerate(self._free):
            if size >= capacity:
                if size == capacity:
                    del self._free[index]
                else:
                    self._free[index] = (start + capacity, size - capacity)
                return Extent(start, capacity)
        largest = max((size for _, size in self._free), default=0)
        raise CacheFullError(
            f"a sequence needs {capacity} cache slots; the largest free range has {largest} "
            f"of {self.num_slots} (free in all: {self.num_free})"
        )

    def release(self, extent: Extent) -> None:
        """Gives the extent's slots back. Raises ``ValueError`` when they are free already."""
        start, end = extent.start, extent.start + extent.capacity
        index = bisect_left(self._free, (start, 0))
        before = self._free[index - 1] if index else None
        after = self._free[index] if index < len(self._free) else None
        if (before and before[0] + before[1] > start) or (after and after[0] < end):
            raise ValueError(f"slots {start} to {end} are free already")
        first, last = index, index
        if before and before[0] + before[1] == start:
            first, start = index - 1, before[0]
        if after and after[0] == end:
            last, end = index + 1, after[0] + after[1]
        self._free[first:last] = [(start, end - start)]


class KVCache:
    """Keys and values of every layer for ``num_slots`` tokens, allocated once.

    Shapes: ``keys`` and ``values`` are ``[num_layers, num_kv_heads, num_slots, head_dim]``.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, num_kv_heads, num_slots, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.allocator = ExtentAllocator(num_slots)

    def withhold(self, count: int) -> int:
        """Takes the last ``count`` slots out of those that the allocator of an unused cache hands out.

        Returns the first of them. Tokens that only fill a pass of fixed shape up are written there.
        """
        self.allocator = ExtentAllocator(self.num_slots - count)
        return self.num_slots

    @staticmethod
    def bytes_per_slot(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Memory that one token takes, in bytes."""
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize

    @property
    def num_slots(self) -> int:
        return self.allocator.num_slots

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores one layer's new ``keys`` and ``values`` ``[T, num_kv_heads, head_dim]`` at ``slots`` ``[T]``."""
        self.keys[layer].index_copy_(1, slots, keys.transpose(0, 1))
        self.values[layer].index_copy_(1, slots, values.transpose(0, 1))

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copies slots ``source`` ``[n]`` to ``destination`` ``[n]`` in every layer (keeps an accepted tree path)."""
        self.keys[:, :, destination] = self.keys[:, :, source]
        self.values[:, :, destination] = self.values[:, :, source]
