"""The parts of a decoder layer, shared by targets and drafts. All work on packed tokens ``[T, ...]``."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eda.formats.config import ModelConfig
from eda.models.attention import PackedBatch, attend
from eda.models.cache import KVCache
from eda.models.linear import Linear
from eda.models.lora import LoraSegment, add_low_rank
from eda.models.rotary import rotate


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        # Under autocast weights are wider than what they multiply; torch's fused kernel wants one type.
        weight = self.weight.to(hidden.dtype)
        return functional.rms_norm(hidden, (weight.shape[0],), weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``, gate and up fused into one matrix (gate rows first)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: Tensor, lora: Sequence[LoraSegment] = (), layer: int = 0) -> Tensor:
        """``[T, hidden_size]`` to the same. ``layer`` picks the LoRA matrices of the segments in ``lora``."""
        gate_up = self.gate_up_proj(hidden)
        for segment in lora:
            add_low_rank(gate_up, hidden, segment, segment.adapter.layers[layer].gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = functional.silu(gate) * up
        output: Tensor = self.down_proj(inner)
        for segment in lora:
            add_low_rank(output, inner, segment, segment.adapter.layers[layer].down)
        return output


class Attention(nn.Module):
    """Grouped-query self-attention over the cache; query, key and value rows are fused into one matrix."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        input_size: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        """``input_size``: width of the input where it is not ``hidden_size``. With ``qk_norm_eps``, queries
        and keys are normalised per head."""
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        qkv_size = (num_heads + 2 * num_kv_heads) * head_dim
        self.qkv_proj = Linear(input_size or hidden_size, qkv_size, bias=qkv_bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)

    def split(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of projected ``[T, Q + 2KV]``: rotated queries ``[T, num_heads, head_dim]``; rotated keys and plain values
        (``num_kv_heads``)."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        queries_keys, values = heads[:, : -self.num_kv_heads], heads[:, -self.num_kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            queries = self.q_norm(queries_keys[:, : self.num_heads])
            keys = self.k_norm(queries_keys[:, self.num_heads :])
            queries_keys = torch.cat([queries, keys], dim=1)
        rotated = rotate(queries_keys, cos, sin)
        return rotated[:, : self.num_heads], rotated[:, self.num_heads :], values

    def attend(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        layer: int,
        batch: PackedBatch,
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        """Writes the keys and values of ``qkv [T, Q + 2KV]`` into ``cache`` at ``layer`` and attends: ``[T, Q]``."""
        queries, keys, values = self.split(qkv, cos, sin)
        cache.write(layer, batch.slots, keys, values)
        return attend(queries, cache.keys[layer], cache.values[layer], batch, masks).view(qkv.shape[0], -1)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        layer: int,
        batch: PackedBatch,
        masks: Sequence[Tensor | None],
        lora: Sequence[LoraSegment] = (),
    ) -> Tensor:
        """Writes the new keys and values into ``cache`` at ``layer`` and attends.

        Args:
            hidden: ``[T, input_size]``.
            cos, sin: ``[T, head_dim]``.
            masks: one per row, from ``masks_for``.

        Returns:
            ``[T, hidden_size]``.
        """
        qkv = self.qkv_proj(hidden)
        for segment in lora:
            add_low_rank(qkv, hidden, segment, segment.adapter.layers[layer].qkv)
        attended = self.attend(qkv, cos, sin, cache, layer, batch, masks)
        output: Tensor = self.o_proj(attended)
        for segment in lora:
            add_low_rank(output, attended, segment, segment.adapter.layers[layer].output)
        return output


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
        )
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def fused_projections(self) -> dict[str, Linear]:
        """The linear layers by the names that ``eda.formats.checkpoint.Projection`` uses."""
        return {
            "qkv": self.attention.qkv_proj,
            "output": self.attention.o_proj,
            "gate_up": self.feed_forward.gate_up_proj,
            "down": self.feed_forward.down_proj,
        }

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        layer: int,
        batch: PackedBatch,
        masks: Sequence[Tensor | None],
        lora: Sequence[LoraSegment] = (),
    ) -> Tensor:
        """``[T, hidden_size]`` to the same; arguments as in ``Attention.forward``."""
        normal = self.attention_norm(hidden)
        hidden = hidden + self.attention(normal, cos, sin, cache, layer, batch, masks, lora)
        output: Tensor = hidden + self.feed_forward(self.feed_forward_norm(hidden), lora, layer)
        return output
