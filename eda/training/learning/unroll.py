"""The draft's forward pass for training: unrolled over its own guesses.

At run time only the first draft token is predicted from target features; the following ones are predicted from the
draft's own outputs, and they attend to cache entries made from them. Training repeats exactly this ("training-time
test", EAGLE-3, arXiv 2503.01840), for many positions of a sequence as starting points at once.

Step ``j`` at root ``i`` stands for the draft token that is ``j`` tokens behind the first one drafted from position
``i``: it reads the embedding of token ``i + 1 + j`` and the output of step ``j - 1`` at root ``i``, sits at position
``i + j``, and predicts token ``i + 2 + j``. It sees the keys of step 0 at positions up to ``i`` (they come from target
features) and the keys of steps ``1 .. j`` at its own root.

Roots do not see each other's own steps, so only the roots that a loss is taken of need to be unrolled. The other
positions, prompts above all, give step 0 their keys and values and nothing else.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from eda.models.draft import DraftModel
from eda.models.private import PrivateModule, PrivateSegment


def unroll(
    draft: DraftModel,
    features: Tensor,
    embeddings: Tensor,
    num_steps: int,
    private: PrivateModule | None = None,
    *,
    first_roots: Tensor | None = None,
    num_roots: int | None = None,
) -> Iterator[Tensor]:
    """Yields the draft's output of each step.

    Args:
        features: target features ``[B, S, 3H]`` of positions ``0 .. S-1``. Padding may stand at the end: attention is
            causal, so valid roots never see it.
        embeddings: fine-tune embeddings ``[B, S + num_steps - 1, H]``; entry ``i`` is of token ``i + 1``.
        first_roots: int64 ``[B]``, the first position of each sequence that is unrolled; 0 when ``None``.
        num_roots: how many positions from there on, ``R``; up to the end when ``None``. Roots beyond the end repeat the
            last position, for sequences that have fewer than the others.

    Yields:
        ``[B, R, H]``, ``num_steps`` times: the input of ``DraftModel.logits``; entry ``r`` of step ``j`` predicts token
        ``first_roots + r + 2 + j``.

    Raises:
        ValueError: ``embeddings`` is shorter than ``S + num_steps - 1``.
    """
    num_sequences, length = features.shape[:2]
    device = features.device
    if embeddings.shape[1] < length + num_steps - 1:
        raise ValueError(
            f"embeddings cover {embeddings.shape[1]} tokens; {length} roots and {num_steps} steps need "
            f"{length + num_steps - 1}"
        )
    if first_roots is None:
        first_roots = torch.zeros(num_sequences, dtype=torch.long, device=device)
    offsets = torch.arange(length if num_roots is None else num_roots, device=device)
    roots = (first_roots[:, None] + offsets).clamp(max=length - 1)  # [B, R]
    row = torch.arange(num_sequences, device=device)[:, None]

    everywhere = _segments(private, num_sequences * length)
    fused = draft.fuse(features.reshape(num_sequences * length, -1), everywhere)
    residual, inputs = draft.attention_inputs(
        fused, embeddings[:, :length].reshape(num_sequences * length, -1)
    )
    positions = torch.arange(length, device=device).repeat(num_sequences)
    cos, sin = draft.rotary(positions, None, residual.dtype)
    queries, keys, values = (
        part.view(num_sequences, length, *part.shape[1:])
        for part in draft.attention.split(draft.project(inputs, everywhere), cos, sin)
    )
    groups = queries.shape[2] // keys.shape[2]
    rooted_keys, rooted_values = (
        part.repeat_interleave(groups, dim=2).transpose(1, 2) for part in (keys, values)
    )
    seen = torch.arange(length, device=device) <= roots[:, None, :, None]  # [B, 1, R, S]
    attended = functional.scaled_dot_product_attention(
        queries[row, roots].transpose(1, 2), rooted_keys, rooted_values, attn_mask=seen
    )
    residual = residual.view(num_sequences, length, -1)[row, roots].flatten(0, 1)
    segments = _segments(private, roots.numel())
    hidden = fused
    own_keys: list[Tensor] = []
    own_values: list[Tensor] = []
    for step in range(num_steps):
        if step:
            step_embeddings = embeddings[row, roots + step].flatten(0, 1)
            residual, inputs = draft.attention_inputs(hidden, step_embeddings)
            cos, sin = draft.rotary((roots + step).flatten(), None, residual.dtype)
            step_queries, step_keys, step_values = (
                part.view(num_sequences, roots.shape[1], *part.shape[1:]).transpose(1, 2)
                for part in draft.attention.split(draft.project(inputs, segments), cos, sin)
            )
            own_keys.append(step_keys.repeat_interleave(groups, dim=1))
            own_values.append(step_values.repeat_interleave(groups, dim=1))
            attended = _attend(step_queries, rooted_keys, rooted_values, seen, own_keys, own_values)
        output = draft.project_output(attended.transpose(1, 2).reshape(roots.numel(), -1), segments)
        hidden = draft.add_feed_forward(residual + output, segments)
        yield hidden.view(num_sequences, roots.shape[1], -1)


def _segments(private: PrivateModule | None, num_tokens: int) -> list[PrivateSegment]:
    return [] if private is None else [PrivateSegment(private, 0, num_tokens)]


def _attend(
    queries: Tensor,
    rooted_keys: Tensor,
    rooted_values: Tensor,
    seen: Tensor,
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
) -> Tensor:
    """Attention ``[B, heads, R, head_dim]`` of one later step.

    Args:
        queries: ``[B, heads, R, head_dim]``; ``own_keys`` and ``own_values`` hold one such tensor for each step.
        rooted_keys, rooted_values: ``[B, heads, S, head_dim]``, from target features.
        seen: bool ``[B, 1, R, S]``.
    """
    length = rooted_keys.shape[2]
    scale = 1.0 / math.sqrt(queries.shape[3])
    queries = queries * scale
    rooted = (queries @ rooted_keys.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
    own = torch.stack([(queries * key).sum(-1) for key in own_keys], dim=-1)
    weights = torch.cat([rooted, own], dim=-1).float().softmax(-1).to(queries.dtype)
    attended = weights[..., :length] @ rooted_values
    for index, value in enumerate(own_values):
        attended = attended + weights[..., length + index, None] * value
    return attended
