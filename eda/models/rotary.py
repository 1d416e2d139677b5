"""Rotary position embedding of packed tokens."""

import math

import torch
from torch import Tensor, nn

from eda.errors import CheckpointError
from eda.formats.config import RopeConfig

_FIRST_TABLE_LENGTH = 2048


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position.

    For all types but ``dynamic`` a position's values never change, so they are kept in a table that doubles
    when a longer sequence comes, and a pass costs one lookup. The module has no parameters.
    """

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.rope = rope
        self.head_dim = head_dim
        self._inverse_frequencies, self._scaling = _static_frequencies(rope, head_dim)
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._outgrown: list[Tensor] = []

    def forward(
        self, positions: Tensor, rope_lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each ``[T, head_dim]`` in ``dtype``; the two halves of the last axis are equal.

        Args:
            positions: int64 ``[T]``. On the CPU the table grows by itself; elsewhere they must lie below
                ``max_position_embeddings`` or the number last given to ``reserve``.
            rope_lengths: int64 ``[T]``, the sequence length at which each token's frequencies are taken: the
                prompt's for prompt tokens, position + 1 for later ones. Read by ``dynamic`` only.

        Raises:
            ValueError: ``dynamic`` without ``rope_lengths``.
        """
        if self.rope.is_dynamic:
            if rope_lengths is None:
                raise ValueError(
                    "rope_lengths is None; dynamic rope needs the sequence length of every token"
                )
            rows = self._rows(positions, self._dynamic_frequencies(rope_lengths), dtype)
        else:
            if positions.device.type == "cpu" and positions.numel():
                self.reserve(int(positions.max()) + 1, dtype=dtype, device=positions.device)
            elif (dtype, positions.device) not in self._tables:
                self.reserve(self.rope.max_position_embeddings, dtype=dtype, device=positions.device)
            rows = self._tables[dtype, positions.device].index_select(0, positions)
        return rows[:, : self.head_dim], rows[:, self.head_dim :]

    def reserve(self, num_positions: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the table reach ``num_positions`` positions; costs nothing when it already does."""
        if self.rope.is_dynamic:
            return
        table = self._tables.get((dtype, device))
        have = 0 if table is None else table.shape[0]
        if num_positions <= have:
            return
        if table is not None and device.type == "cuda":
            self._outgrown.append(table)  # CUDA graphs that were recorded with it go on reading it
        length = max(num_positions, 2 * have, min(_FIRST_TABLE_LENGTH, self.rope.max_position_embeddings))
        # Drafts are trained through these values, which a tensor made in inference mode would not allow.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(length, device=device)
            self._tables[dtype, device] = self._rows(positions, self._inverse_frequencies.to(device), dtype)

    def _rows(self, positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> Tensor:
        """``[T, 2 * head_dim]``: cosines, then sines."""
        angles = positions[:, None].float() * inverse_frequencies
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        return torch.cat([cos, cos, sin, sin], dim=-1).to(dtype)

    def _dynamic_frequencies(self, rope_lengths: Tensor) -> Tensor:
        """``[T, head_dim / 2]``: the base grows once a sequence outgrows the trained length."""
        limit, factor, size = self.rope.max_position_embeddings, self.rope.parameters["factor"], self.head_dim
        stretch = factor * rope_lengths.clamp(min=limit).double() / limit - (factor - 1)
        base = self.rope.theta * stretch ** (size / (size - 2))
        exponents = torch.arange(0, size, 2, device=rope_lengths.device).double() / size
        frequencies: Tensor = 1.0 / base[:, None] ** exponents
        return frequencies.float()


def _static_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies ``[head_dim / 2]`` (float32, CPU) and the factor on cosines and sines."""
    with torch.device("cpu"):  # models are built on the meta device; these values are needed all the same
        if rope.type in ("default", "dynamic", "divided"):
            frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
            if rope.type == "divided":
                frequencies = frequencies / torch.tensor(rope.parameters["divisors"])
            return frequencies, 1.0
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        # Only the attention geometry of this config is read.
        config = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            max_position_embeddings=rope.max_position_embeddings,
            rope_parameters={"rope_type": rope.type, "rope_theta": rope.theta, **rope.parameters},
        )
        try:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.type](config, torch.device("cpu"))
        except Exception as error:  # they raise what their arithmetic raises
            raise CheckpointError(
                f"rope parameters {dict(rope.parameters)} cannot be used: {error!r}"
            ) from error
    if not frequencies.isfinite().all() or not math.isfinite(scaling):
        raise CheckpointError(f"rope parameters {dict(rope.parameters)} give frequencies that are not finite")
    return frequencies, float(scaling)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``[T, num_heads, head_dim]`` by the angles of ``cos`` and ``sin`` ``[T, head_dim]``."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cos[:, None], torch.cat([-second, first], dim=-1), sin[:, None])


def apply_rotary(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates ``queries`` ``[T, num_heads, head_dim]`` and ``keys`` ``[T, num_kv_heads, head_dim]``."""
    return rotate(queries, cos, sin), rotate(keys, cos, sin)
