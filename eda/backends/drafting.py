"""What drafting is made of, whoever computes it: the features that are read, and how rows are packed for the draft."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eda.models.attention import AttentionRow, PackedBatch
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateSegment
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState
from eda.transfers import upload


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Target features that the draft reads in one pass, each together with the token that follows it."""

    states: Sequence[SequenceState]
    """In draft order (see ``in_draft_order``)."""
    features: Tensor
    """``[sum(lengths), 3H]``"""
    lengths: list[int]
    """Features of each row."""
    known: list[int]
    """Tokens of each row in the draft's cache before."""
    tokens: list[int]
    """The ids behind the features."""

    @classmethod
    def of(cls, states: Sequence[SequenceState]) -> "Reading":
        """All pending features of ``states``, which count as read from now on; each has at least one."""
        parts: list[Tensor] = []
        lengths: list[int] = []
        known: list[int] = []
        tokens: list[int] = []
        for state in states:
            features = state.take_pending_features()
            length = features.shape[0]
            parts.append(features)
            lengths.append(length)
            known.append(state.num_draft_cached)
            tokens += state.token_ids[state.num_draft_cached + 1 : state.num_draft_cached + 1 + length]
            state.num_draft_cached += length
        return cls(states, parts[0] if len(parts) == 1 else torch.cat(parts), lengths, known, tokens)


class DraftLayer(Protocol):
    """Single passes of the draft."""

    def extend(self, reading: Reading, batch: PackedBatch, segments: Sequence[PrivateSegment]) -> Tensor:
        """Feeds features to the draft: each row's last output ``[B, H]``."""
        ...

    def step(
        self, hidden: Tensor, embeddings: Tensor, batch: PackedBatch, segments: Sequence[PrivateSegment]
    ) -> Tensor:
        """One pass over the draft's own outputs: ``hidden`` and ``embeddings``, both ``[T, H]``, to ``[T, H]``."""
        ...

    def logits(self, hidden: Tensor, fine_tune: FineTune) -> Tensor:
        """Float32 ``[N, V_draft]`` of ``hidden [N, H]``, by the output layer of ``fine_tune``."""
        ...


class Proposer(Protocol):
    """The passes of one round: an extension, then chains or trees from its outputs."""

    def extend(self, reading: Reading) -> Tensor:
        """Each row's last output ``[B, H]``, which predicts its first draft token."""
        ...

    def propose_chains(
        self, states: Sequence[SequenceState], hidden: Tensor, lengths: Sequence[int]
    ) -> list[Proposal]:
        """Chains of at most ``lengths[b]`` tokens from ``hidden [B, H]``; states in draft order."""
        ...

    def propose_trees(
        self, states: Sequence[SequenceState], hidden: Tensor, *, top_k: int, depth: int, num_nodes: int
    ) -> list[Proposal]:
        """Dynamic trees of one shape for all rows, each of its best nodes; see ``eda/speculation/tree.py``."""
        ...


def in_draft_order(states: Sequence[SequenceState]) -> list[int]:
    """Indices of ``states`` so that equal output layers and equal private modules stand together."""
    return sorted(
        range(len(states)),
        key=lambda index: (id(states[index].fine_tune.output_owner), id(states[index].private)),
    )


def place_tokens(
    states: Sequence[SequenceState],
    counts: Sequence[int],
    lengths: Sequence[int],
    device: torch.device,
    ancestors: Tensor | None = None,
    depth: int = 0,
) -> PackedBatch:
    """Places ``counts[b]`` new tokens of each row behind its ``lengths[b]`` cached ones.

    Args:
        ancestors: bool ``[B, n, keys]`` for nodes of a tree, which are ``depth`` levels behind the extension.
    """
    rows: list[AttentionRow] = []
    positions: list[int] = []
    slots: list[int] = []
    for index, (state, count, length) in enumerate(zip(states, counts, lengths, strict=True)):
        start = state.slot_start
        mask = None if ancestors is None else ancestors[index]
        rows.append(AttentionRow(len(slots), count, start, length + count, mask))
        slots.extend(range(start + length, start + length + count))
        if ancestors is None:
            positions.extend(range(length, length + count))
        else:
            positions.extend([state.num_draft_cached + depth] * count)
    packed = upload([positions, slots], device)
    return PackedBatch(packed[0], packed[1], rows)


def embed(states: Sequence[SequenceState], counts: Sequence[int], tokens: Tensor) -> Tensor:
    """Embeddings ``[T, H]`` of packed ``tokens [T]``, each by its row's fine-tune."""
    parts = [fine_tune.embed(tokens[start:end]) for fine_tune, start, end in output_runs(states, counts)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def output_runs(states: Sequence[SequenceState], counts: Sequence[int]) -> list[tuple[FineTune, int, int]]:
    """Ranges of tokens whose rows share embeddings and output head: ``(fine_tune, start, end)``."""
    runs: list[tuple[FineTune, int, int]] = []
    end = 0
    for state, count in zip(states, counts, strict=True):
        if runs and runs[-1][0].output_owner is state.fine_tune.output_owner:
            runs[-1] = (runs[-1][0], runs[-1][1], end + count)
        else:
            runs.append((state.fine_tune, end, end + count))
        end += count
    return runs


def private_segments(states: Sequence[SequenceState], counts: Sequence[int]) -> list[PrivateSegment]:
    """Which tokens use which private module."""
    segments: list[PrivateSegment] = []
    end = 0
    for state, count in zip(states, counts, strict=True):
        start, end = end, end + count
        if state.private is None:
            continue
        if segments and segments[-1].module is state.private and segments[-1].end == start:
            start = segments.pop().start
        segments.append(PrivateSegment(state.private, start, end))
    return segments
