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


@dataclass(slots=True, frozen=True, kw_only=True)
class StaticBatch(PackedBatch):
    """A pack of fixed shape: ``B`` rows of ``Q`` tokens, ``T = B * Q``, that attend over ``K`` keys each.

    Whatever differs from pass to pass lies in tensors, so that a recorded pass can be replayed on other values.
    ``rows`` holds one stand-in whose ``kv_len`` is ``K``.
    """

    key_slots: Tensor
    """Int64 ``[B, K]``: the cache slot of each key, always one of the row's own."""
    key_positions: Tensor
    """Int64 ``[B, K]``, for sliding windows."""
    seen: Tensor
    """Bool ``[B, Q, K]``: which keys each query sees; one of them at least."""
    groups: int
    """Query heads of each key head."""
    dtype: torch.dtype
    """Type of the queries."""


def static_batch(
    positions: Tensor,
    slots: Tensor,
    starts: Tensor,
    contexts: Tensor,
    lengths: Tensor,
    tail: Tensor,
    num_keys: int,
    *,
    groups: int,
    dtype: torch.dtype,
    rope_lengths: Tensor | None = None,
) -> StaticBatch:
    """A ``StaticBatch`` from values on the device, without a look at any of them.

    Args:
        positions, slots: int64 ``[B, Q]``. Tokens that only fill a row up need slots that belong to nobody.
        starts: int64 ``[B]``, first cache slot of each row.
        contexts: int64 ``[B]``, keys from there on that all of the row's queries see.
        lengths: int64 ``[B]``, all keys of the row, from 1 to ``num_keys``; slots behind them are never read.
        tail: bool ``[B, Q, L]``, which of the ``L`` keys behind the context each query sees. It has to see one key.
        num_keys: ``K``.
        groups: query heads of each key head.
        dtype: of the queries.
        rope_lengths: int64 ``[B, Q]``, see ``PackedBatch``.
    """
    num_queries, tail_length = tail.shape[1], tail.shape[2]
    place = torch.arange(num_keys, device=positions.device)
    # A masked key still meets a weight of 0, and 0 times another sequence's NaN is NaN: so a row reads its own slots.
    key_slots = starts[:, None] + torch.minimum(place[None], lengths[:, None] - 1)
    offsets = place[None] - contexts[:, None]
    inside = offsets.clamp(0, tail_length - 1)
    in_tail = tail.gather(2, inside[:, None].expand(-1, num_queries, -1)) & (offsets < tail_length)[:, None]
    new_positions = positions.gather(1, inside.clamp(max=num_queries - 1))
    stand_in = AttentionRow(0, num_queries, 0, num_keys)
    return StaticBatch(
        positions.reshape(-1),
        slots.reshape(-1),
        (stand_in,),
        None if rope_lengths is None else rope_lengths.reshape(-1),
        key_slots=key_slots,
        key_positions=torch.where(offsets < 0, place[None], new_positions),
        seen=(offsets < 0)[:, None] | in_tail,
        groups=groups,
        dtype=dtype,
    )


def _static_mask(batch: StaticBatch, sliding_window: int | None) -> Tensor:
    """``[B, 1, groups * Q, K]`` to add to scores: 0 for seen keys, -inf for the others."""
    num_rows, num_queries, num_keys = batch.seen.shape
    seen = batch.seen
    if sliding_window is not None:
        query_positions = batch.positions.view(num_rows, num_queries, 1)
        seen = seen & (batch.key_positions[:, None] > query_positions - sliding_window)
    bias = torch.zeros(seen.shape, dtype=batch.dtype, device=seen.device).masked_fill_(~seen, -math.inf)
    bias = bias[:, None].expand(-1, batch.groups, -1, -1)
    return bias.reshape(num_rows, 1, batch.groups * num_queries, num_keys)


def masks_for(batch: PackedBatch, sliding_window: int | None) -> list[Tensor | None]:
    """One boolean mask per row; built once per pass and used by every layer with the same window.

    Of a ``StaticBatch`` one for all rows, to be added to the scores.
    """
    if isinstance(batch, StaticBatch):
        return [_static_mask(batch, sliding_window)]
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
    if isinstance(batch, StaticBatch):
        return _attend_static(queries, keys, values, batch, masks[0], factor)
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


def _attend_static(
    queries: Tensor, keys: Tensor, values: Tensor, batch: StaticBatch, mask: Tensor | None, scale: float
) -> Tensor:
    """``attend`` for a batch of fixed shape: all rows at once, over copies of their keys.

    The heads of a group stand along the query axis: CUDA's kernels that take masks know no grouped heads.
    """
    num_rows, num_queries, num_keys = batch.seen.shape
    num_heads, head_dim, num_kv_heads = queries.shape[1], queries.shape[2], keys.shape[0]
    groups = batch.groups
    index = batch.key_slots.view(-1)
    key, value = (
        part.index_select(1, index).view(num_kv_heads, num_rows, num_keys, head_dim).transpose(0, 1)
        for part in (keys, values)
    )
    query = queries.reshape(num_rows, num_queries, num_kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(num_rows, num_kv_heads, groups * num_queries, head_dim)
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    attended = attended.reshape(num_rows, num_kv_heads, groups, num_queries, head_dim).permute(0, 3, 1, 2, 4)
    return attended.reshape(num_rows * num_queries, num_heads, head_dim).contiguous()
