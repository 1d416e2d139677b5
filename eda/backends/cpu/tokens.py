"""The tokens of a pass as the C++ functions read them."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eda.backends.cpu.library import Segment, Tokens, Visible
from eda.models.attention import PackedBatch
from eda.models.cache import KVCache


@dataclass(slots=True)
class SegmentWeights:
    """Addresses of the further weights of tokens ``start`` to ``end``; 0 for none."""

    start: int
    end: int
    lora: int = 0
    private_gate_up: int = 0
    private_down: int = 0


class TokenArrays:
    """A ``Tokens`` structure with the arrays that it points to."""

    def __init__(
        self, batch: PackedBatch, cos: Tensor, sin: Tensor, cache: KVCache, special: Sequence[SegmentWeights]
    ) -> None:
        cos, sin = cos.contiguous(), sin.contiguous()
        count = batch.positions.shape[0]
        visible = (Visible * count)()
        kept: list[Any] = [visible, cos, sin, batch.slots]
        for row in batch.rows:
            context = row.kv_len - row.query_len
            if row.tail_mask is None:
                for query in range(row.query_len):
                    entry = visible[row.query_start + query]
                    entry.first_slot, entry.num_leading = row.cache_start, context + query + 1
                continue
            context = row.kv_len - row.tail_mask.shape[1]
            for query, seen in enumerate(row.tail_mask.tolist()):
                extra = [context + place for place, is_seen in enumerate(seen) if is_seen]
                array = (ctypes.c_int32 * len(extra))(*extra)
                kept.append(array)
                entry = visible[row.query_start + query]
                entry.first_slot, entry.num_leading = row.cache_start, context
                entry.num_extra, entry.extra = len(extra), ctypes.addressof(array)
        segments = _covering(special, count)
        kept.append(segments)
        self._kept = kept
        self.struct = Tokens(
            count,
            len(segments),
            ctypes.addressof(segments),
            cos.data_ptr(),
            sin.data_ptr(),
            batch.slots.data_ptr(),
            ctypes.addressof(visible),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            cache.num_slots,
        )


def _covering(special: Sequence[SegmentWeights], count: int) -> "ctypes.Array[Segment]":
    """All tokens in order: the given segments, and plain ones between them."""
    found: list[tuple[int, int, int, int, int]] = []
    end = 0
    for part in special:
        if part.start > end:
            found.append((end, part.start, 0, 0, 0))
        found.append((part.start, part.end, part.lora, part.private_gate_up, part.private_down))
        end = part.end
    if end < count:
        found.append((end, count, 0, 0, 0))
    return (Segment * len(found))(*(Segment(*part) for part in found))


def as_pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Address of a contiguous tensor's data."""
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
