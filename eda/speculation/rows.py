"""The rows of one step, and how they are packed for the target's pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.models.attention import AttentionRow, PackedBatch
from eda.models.lora import LoraAdapter, LoraSegment
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState
from eda.transfers import upload


@dataclass(frozen=True, slots=True, eq=False)
class PassRow:
    """One sequence's new tokens in a target pass; all lists have one entry per token."""

    tokens: Sequence[int]
    positions: Sequence[int]
    rope_lengths: Sequence[int]
    cache_start: int
    context: int
    """Cached keys before the new tokens, which go to the slots behind them."""
    seen: Sequence[Sequence[int]] | None
    """``[n][n]``: 1 where a token sees another of the new ones, else 0; ``None`` is causal."""
    first_wanted: int
    """An answer is wanted from this token on (``n``: on none)."""
    lora: LoraAdapter | None = None


@dataclass(slots=True)
class StepRow:
    """A scheduled row on its way through a step."""

    index: int
    state: SequenceState
    num_tokens: int
    emits: bool
    """Whether this pass computes the last known token, so that new ones follow."""
    proposal: Proposal | None = None

    @property
    def num_queries(self) -> int:
        return self.num_tokens + (len(self.proposal.token_ids) if self.proposal else 0)

    def for_target(self) -> PassRow:
        """Its known and drafted tokens, as the target computes them."""
        state, first = self.state, self.state.num_computed
        tokens = state.token_ids[first : first + self.num_tokens]
        positions = list(range(first, first + self.num_tokens))
        seen = None
        if self.proposal is not None:
            tokens += self.proposal.token_ids
            positions += [first + depth for depth in self.proposal.depths()]
            if not self.proposal.is_chain:
                seen = _ancestors(self.proposal)
        return PassRow(
            tokens,
            positions,
            [max(state.num_prompt_tokens, position + 1) for position in positions],
            state.slot_start,
            first,
            seen,
            self.num_tokens - 1 if self.emits else len(tokens),
            state.fine_tune.lora,
        )


def pack_rows(rows: Sequence[PassRow], device: torch.device) -> tuple[Tensor, PackedBatch]:
    """Token ids ``[T]`` and batch of ``rows``, one behind the other."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rope_lengths: list[int] = []
    attention_rows: list[AttentionRow] = []
    for row in rows:
        size, start = len(row.tokens), row.cache_start
        mask = None if row.seen is None else upload(row.seen, device, torch.bool)
        attention_rows.append(AttentionRow(len(tokens), size, start, row.context + size, mask))
        tokens += row.tokens
        positions += row.positions
        rope_lengths += row.rope_lengths
        slots += range(start + row.context, start + row.context + size)
    packed = upload([tokens, positions, slots, rope_lengths], device)
    return packed[0], PackedBatch(packed[1], packed[2], attention_rows, packed[3])


def wanted_tokens(rows: Sequence[PassRow]) -> list[int]:
    """Places in the pack of the tokens that an answer is wanted on."""
    wanted: list[int] = []
    start = 0
    for row in rows:
        wanted += range(start + row.first_wanted, start + len(row.tokens))
        start += len(row.tokens)
    return wanted


def lora_segments(rows: Sequence[PassRow]) -> list[LoraSegment]:
    """Segments of the pack."""
    segments: list[LoraSegment] = []
    end = 0
    for row in rows:
        start, end = end, end + len(row.tokens)
        if row.lora is None:
            continue
        if segments and segments[-1].adapter is row.lora and segments[-1].end == start:
            start = segments.pop().start
        segments.append(LoraSegment(row.lora, start, end))
    return segments


def _ancestors(proposal: Proposal) -> list[list[int]]:
    """``[1 + n][1 + n]``: 1 where node ``i`` (0 is the root) sees node ``j``, itself or an ancestor; else 0."""
    size = 1 + len(proposal.token_ids)
    seen = [[1] + [0] * (size - 1)]
    for node, parent in enumerate(proposal.parents, start=1):
        line = list(seen[parent])
        line[node] = 1
        seen.append(line)
    return seen
