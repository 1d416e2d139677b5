"""Rounds of one draft on the C++ passes and on torch, from random features."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.backends.cpu.draft import DraftHead, DraftKernel
from eda.backends.cpu.library import DraftRow, Sampling
from eda.backends.cpu.weights import WeightFormat
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.cache import Extent
from eda.models.draft import DraftConfig, DraftModel
from eda.models.private import PrivateModule, PrivateSegment
from tests.support.narrow import narrow_draft

NUM_SLOTS = 256


def draft_config(
    hidden_size: int = 48, head_dim: int = 32, num_heads: int = 4, intermediate_size: int = 41
) -> DraftConfig:
    return DraftConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=2,
        head_dim=head_dim,
        tap_layers=(0, 1, 3),
        vocab_size=150,
        draft_vocab_size=85,
        max_position_embeddings=256,
    )


@dataclass
class Part:
    """One sequence's share of a round."""

    extent: Extent
    features: Tensor
    """``[n, 3H]``"""
    token_ids: list[int]
    module: PrivateModule | None = None
    num_steps: int = 0
    min_probability: float = 0.0
    temperature: float = 0.0

    @property
    def count(self) -> int:
        return len(self.token_ids)


class Rounds:
    """The same draft thrice: on the C++ passes, and on torch in bfloat16 and in float32.

    In bfloat16 the first reads the same weights as the others, so that errors are those of its sums.
    """

    def __init__(self, config: DraftConfig, seed: int = 0, *, weights: WeightFormat = "bfloat16") -> None:
        self.config = config
        self.narrow, self.wide = narrow_draft(config, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.embedding = torch.randn(config.vocab_size, config.hidden_size, generator=generator).bfloat16()
        rows = torch.randn(config.draft_vocab_size, config.hidden_size, generator=generator)
        self.head_rows = (rows * 0.4).bfloat16()
        self.cache = self.narrow.new_cache(NUM_SLOTS)
        self.kernel = DraftKernel(self.narrow, self.cache, weights=weights)
        self.head = DraftHead(self.head_rows, self.embedding, weights=weights)
        self._torch_caches = {draft: draft.new_cache(NUM_SLOTS) for draft in (self.narrow, self.wide)}
        self._generator = generator

    def part(
        self, extent: Extent, count: int, module: PrivateModule | None = None, num_steps: int = 0
    ) -> Part:
        """Random features and tokens."""
        features = torch.randn(count, self.config.num_features, generator=self._generator).bfloat16()
        tokens = torch.randint(self.config.vocab_size, (count,), generator=self._generator)
        return Part(extent, features, tokens.tolist(), module, num_steps)

    def extents(self, count: int, capacity: int = 40) -> list[Extent]:
        return [self.cache.allocator.allocate(capacity) for _ in range(count)]

    def extend(self, parts: Sequence[Part]) -> tuple[Tensor, list[list[int]]]:
        """One round on the C++ passes: last outputs ``[B, H]``, and chains. Does not grow the extents."""
        hidden, chains, _ = self.draw(parts, None)
        return hidden, chains

    def draw(
        self, parts: Sequence[Part], uniforms: Tensor | None
    ) -> tuple[Tensor, list[list[int]], Tensor | None]:
        """The same for rows with a temperature: with the distributions that tokens were drawn from."""
        features, tokens, batch = packed(parts)
        rows = [
            self.row(part, first_token=batch.rows[place].query_start, num_tokens=part.count)
            for place, part in enumerate(parts)
        ]
        return self.kernel.extend(rows, features, tokens, batch, _segments(parts), uniforms)

    def row(self, part: Part, first_token: int = 0, num_tokens: int = 0) -> DraftRow:
        row = DraftRow(
            part.extent.start, part.extent.length + part.count, part.num_steps, first_token, num_tokens
        )
        row.min_probability, row.sampling = part.min_probability, Sampling(1.0, part.temperature)
        row.head, row.embedding = self.head.packed.pointer, self.head.embedding.data_ptr()
        if part.module is not None:
            private = self.kernel.private(part.module)
            row.lora = private.attention
            row.private_gate_up, row.private_down = private.gate_up, private.down
        return row

    def extend_on_torch(self, parts: Sequence[Part], draft: DraftModel) -> Tensor:
        """The same by ``DraftModel`` itself, in its own type."""
        dtype = draft.fc.weight.dtype
        features, tokens, batch = packed(parts)
        own = {part.module: copy.deepcopy(part.module).to(dtype) for part in parts if part.module is not None}
        segments = [PrivateSegment(own[part.module], part.start, part.end) for part in _segments(parts)]
        embeddings = self.embedding[tokens].to(dtype)
        fused = draft.fuse(features.to(dtype), segments)
        hidden: Tensor = draft(fused, embeddings, batch, self._torch_caches[draft], segments)
        return hidden[torch.tensor([row.query_start + row.query_len - 1 for row in batch.rows])]

    def step(self, parts: Sequence[Part], hidden: Tensor, tokens: Sequence[int], step: int) -> Tensor:
        """Feeds each row one drafted token behind ``step`` others, by a pass of its own: ``[B, H]``."""
        ends = [part.extent.length + part.count + step for part in parts]
        rows = [
            AttentionRow(place, 1, part.extent.start, end + 1)
            for place, (part, end) in enumerate(zip(parts, ends, strict=True))
        ]
        slots = [part.extent.start + end for part, end in zip(parts, ends, strict=True)]
        segments = [
            PrivateSegment(part.module, place, place + 1)
            for place, part in enumerate(parts)
            if part.module is not None
        ]
        batch = PackedBatch(torch.tensor(ends), torch.tensor(slots), rows)
        return self.kernel.forward(hidden, self.embedding[list(tokens)], batch, segments)

    def step_logits(self, part: Part, hidden: Tensor, chain: Sequence[int]) -> Tensor:
        """Draft logits ``[len(chain), V_draft]`` that the tokens of a chain are chosen by; ``hidden [H]``."""
        found, state = [], hidden[None]
        for step, token in enumerate(chain):
            found.append(self.kernel.logits(state, self.head))
            state = self.step([part], state, [token], step)
        return torch.cat(found)


def packed(parts: Sequence[Part]) -> tuple[Tensor, list[int], PackedBatch]:
    rows, positions, slots = [], [], []
    for part in parts:
        past = part.extent.length
        rows.append(AttentionRow(len(slots), part.count, part.extent.start, past + part.count))
        positions += range(past, past + part.count)
        slots += range(part.extent.start + past, part.extent.start + past + part.count)
    batch = PackedBatch(torch.tensor(positions), torch.tensor(slots), rows)
    return torch.cat([part.features for part in parts]), [t for part in parts for t in part.token_ids], batch


def _segments(parts: Sequence[Part]) -> list[PrivateSegment]:
    segments, end = [], 0
    for part in parts:
        start, end = end, end + part.count
        if part.module is not None:
            segments.append(PrivateSegment(part.module, start, end))
    return segments
