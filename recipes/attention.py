"""Attention for training on a CPU: whole blocks of scores as matrix products.

torch's fused attention for the CPU is written for long sequences in float32. For the short rows of these recipes, in
bfloat16, plain products with a compiled softmax between them take about half its time, and memory is no concern.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "blocked_causal"
_BLOCK = 256


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of `[batch, heads, length, head_dim]`; returns the same shape.

    Queries go in blocks, so that the keys behind a block are never multiplied.
    """
    length = queries.shape[2]
    parts = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        scores = (queries[:, :, start:end] @ keys[:, :, :end].mT).float() * scale
        row = torch.arange(start, end, device=queries.device)
        seen = torch.arange(end, device=queries.device)[None, :] <= row[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(values.dtype)
        parts.append(weights @ values[:, :, :end])
    return torch.cat(parts, dim=2)


def _for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls. Rows start together and padding is on the right: no mask is needed."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    return causal_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None


def use_blocked_attention(model: nn.Module) -> None:
    """Makes a transformers model use this attention. Only for training on unpadded or right-padded rows."""
    AttentionInterface.register(NAME, _for_transformers)
    AttentionMaskInterface.register(NAME, lambda *_arguments, **_named: None)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
