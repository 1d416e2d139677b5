"""The training forward pass against the passes that the decoder makes: extension over a cache, then a chain."""

import pytest
import torch
from torch import Tensor

from eda.models.attention import AttentionRow, PackedBatch
from eda.models.draft import DraftConfig, DraftModel
from eda.models.private import PrivateModule, PrivateSegment
from eda.training.learning.unroll import unroll

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
"""Norms are computed in float32, and sums of different lengths round differently."""

CONFIG = DraftConfig(
    hidden_size=24,
    intermediate_size=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    tap_layers=(0, 1, 2),
    vocab_size=50,
    draft_vocab_size=50,
    max_position_embeddings=64,
)


def random_draft(seed: int) -> DraftModel:
    draft = DraftModel.initialised(CONFIG, torch.arange(50), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.3 * noise)
    return draft


def random_private(seed: int) -> PrivateModule:
    module = PrivateModule(CONFIG.private_config(16, fc_rank=3, attention_rank=5))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module


def decoder_outputs(
    draft: DraftModel,
    features: Tensor,
    embeddings: Tensor,
    root: int,
    steps: int,
    private: PrivateModule | None,
) -> Tensor:
    """Outputs ``[steps, H]`` of the draft at run time: one pass over the features up to ``root``, then single ones."""
    cache = draft.new_cache(64)
    start = cache.allocator.allocate(50).start

    def run(hidden: Tensor, rows: Tensor, first: int) -> Tensor:
        count = len(rows)
        positions = torch.arange(first, first + count)
        batch = PackedBatch(positions, start + positions, [AttentionRow(0, count, start, first + count)])
        segments = [] if private is None else [PrivateSegment(private, 0, count)]
        return draft(hidden, rows, batch, cache, segments)  # type: ignore[no-any-return]

    segments = [] if private is None else [PrivateSegment(private, 0, root + 1)]
    fused = draft.fuse(features[: root + 1], segments)
    outputs = [run(fused, embeddings[: root + 1], 0)[-1]]
    for step in range(1, steps):
        outputs.append(run(outputs[-1][None], embeddings[root + step][None], root + step)[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("with_private", [False, True])
def test_equals_the_decoders_passes_at_every_root(with_private: bool) -> None:
    torch.manual_seed(0)
    draft, private = random_draft(1), random_private(2) if with_private else None
    length, steps = 9, 4
    features, embeddings = torch.randn(2, length, 72), torch.randn(2, length + steps - 1, 24)
    with torch.no_grad():
        found = torch.stack(list(unroll(draft, features, embeddings, steps, private)))
        for sequence in range(2):
            for root in range(length):
                expected = decoder_outputs(
                    draft, features[sequence], embeddings[sequence], root, steps, private
                )
                torch.testing.assert_close(found[:, sequence, root], expected, **CLOSE)


def test_chosen_roots_equal_the_same_roots_of_the_whole() -> None:
    torch.manual_seed(0)
    draft, private = random_draft(3), random_private(4)
    features, embeddings = torch.randn(3, 10, 72), torch.randn(3, 12, 24)
    first = torch.tensor([0, 4, 7])
    with torch.no_grad():
        whole = list(unroll(draft, features, embeddings, 3, private))
        part = list(unroll(draft, features, embeddings, 3, private, first_roots=first, num_roots=5))
    for step_whole, step_part in zip(whole, part, strict=True):
        for sequence, start in enumerate(first.tolist()):
            count = min(5, 10 - start)
            expected = step_whole[sequence, start : start + count]
            torch.testing.assert_close(step_part[sequence, :count], expected, **CLOSE)


def test_padding_at_the_end_changes_nothing() -> None:
    torch.manual_seed(0)
    draft = random_draft(5)
    features, embeddings = torch.randn(1, 6, 72), torch.randn(1, 8, 24)
    padded = torch.cat([features, torch.full((1, 3, 72), 100.0)], dim=1)
    padded_embeddings = torch.cat([embeddings, torch.full((1, 3, 24), 100.0)], dim=1)
    with torch.no_grad():
        for short, long in zip(
            unroll(draft, features, embeddings, 3),
            unroll(draft, padded, padded_embeddings, 3),
            strict=True,
        ):
            torch.testing.assert_close(long[:, :6], short, **CLOSE)


def test_too_few_embeddings_are_refused() -> None:
    draft = random_draft(6)
    with pytest.raises(ValueError, match="4 roots and 3 steps need 6"):
        next(unroll(draft, torch.randn(1, 4, 72), torch.randn(1, 5, 24), 3))
