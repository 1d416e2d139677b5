"""Attention of a packed batch over the key/value cache.

A packed batch has no padding: the tokens of all rows lie one behind another on the first axis ``T``. Matrix
products see one tall matrix; only attention looks at rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(slots=True, frozen=True)
class AttentionRow:
    """One row's queries and the cached keys that they see.

    Queries are tokens ``query_start`` to ``query_start + query_len`` of the pack. Keys are the ``kv_len`` slots from
    ``cache_start`` on, the row's new tokens included as the last ``query_len`` of them.
    """

    query_start: int
    query_len: int
    cache_start: int
    kv_len: int
    tail_mask: Tensor | None = None
    """Bool ``[query_len, tail_len]``: which of the last ``tail_len`` keys each query sees (a draft tree). Keys before
    them are all seen. ``None`` means causal."""


@dataclass(slots=True, frozen=True)
class PackedBatch:
    """Where the tokens of a pass lie. ``T`` is the number of tokens of all rows together."""

    positions: Tensor
    """Int64 ``[T]``: positions within each sequence, for rotary embedding and sliding windows."""
    slots: Tensor
    """Int64 ``[T]``: cache slots that the new keys and values are written to."""
    rows: Sequence[AttentionRow]
    rope_lengths: Tensor | None = None
    """Int64 ``[T]``: sequence length that each token's rotary frequencies are taken at (dynamic rope only)."""


def _visible(batch: PackedBatch, row: AttentionRow, sliding_window: int | None) -> Tensor | None:
    """Bool ``[query_len, kv_len]`` of seen keys, or ``None`` when every query sees every key."""
    if (
        row.query_len == 1
        and row.tail_mask is None
        and (sliding_window is None or row.kv_len <= sliding_window)
    ):
        return None
    device = batch.positions.device
    if row.tail_mask is None:
        seen = torch.ones(row.query_len, row.kv_len, dtype=torch.bool, device=device)
        seen = seen.tril(row.kv_len - row.query_len)
    else:
        context = row.kv_len - row.tail_mask.shape[1]
        seen = functional.pad(row.tail_mask, (context, 0), value=True)
    if sliding_window is not None:
        query_positions = batch.positions[row.query_start : row.query_start + row.query_len]
        # Slots before the new tokens hold positions 0, 1, 2, ...; the new tokens of a tree share positions by depth.
        context_positions = torch.arange(row.kv_len - row.query_len, device=device)
        key_positions = torch.cat([context_positions, query_positions])
        seen = seen & (key_positions[None, :] > query_positions[:, None] - sliding_window)
    return seen


def masks_for(batch: PackedBatch, sliding_window: int | None) -> list[Tensor | None]:
    """One boolean mask per row; built once per pass and used by every layer with the same window."""
    return [_visible(batch, row, sliding_window) for row in batch.rows]


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: PackedBatch,
    masks: Sequence[Tensor | None],
    *,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of every row over its own cache extent.

    Args:
        queries: ``[T, num_heads, head_dim]``, rotated.
        keys, values: one layer of the cache, ``[num_kv_heads, num_slots, head_dim]``; the new tokens are in it.
        masks: from ``masks_for``, one per row.
        scale: factor on the scores; ``1 / sqrt(head_dim)`` when ``None``.

    Returns:
        ``[T, num_heads, head_dim]``.
    """
    num_heads, head_dim = queries.shape[1], queries.shape[2]
    num_kv_heads = keys.shape[0]
    factor = 1.0 / math.sqrt(head_dim) if scale is None else scale
    output = torch.empty_like(queries)
    for row, mask in zip(batch.rows, masks, strict=True):
        rows = slice(row.query_start, row.query_start + row.query_len)
        key = keys[None, :, row.cache_start : row.cache_start + row.kv_len]
        value = values[None, :, row.cache_start : row.cache_start + row.kv_len]
        if row.query_len == 1:
            # All heads of a group read the same keys. Laid along the query axis they do so without copies of
            # them, which makes this pass, the most frequent one, several times faster.
            query = queries[rows].reshape(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
            attended = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=factor
            )
            output[rows] = attended.reshape(1, num_heads, head_dim)
        else:
            query = queries[rows].transpose(0, 1)[None]
            attended = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=factor, enable_gqa=num_heads != num_kv_heads
            )
            output[rows] = attended[0].transpose(0, 1)
    return output
