"""The rows of one step, and how they are packed for the target's pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.attention import AttentionRow, PackedBatch
from eda.lora import LoraSegment
from eda.proposal import Proposal
from eda.state import SequenceState
from eda.static.target_pass import TargetRow
from eda.transfers import upload


@dataclass(slots=True)
class StepRow:
    """A scheduled row on its way through a step."""

    index: int
    state: SequenceState
    num_tokens: int
    emits: bool
    """Whether this pass computes the last known token, so that new ones follow."""
    proposal: Proposal | None = None
    start: int = 0
    """Place of its first token in the pack."""

    @property
    def num_queries(self) -> int:
        return self.num_tokens + (len(self.proposal.token_ids) if self.proposal else 0)

    def targets(self) -> TargetRow:
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
        return TargetRow(
            tokens,
            positions,
            [max(state.num_prompt_tokens, position + 1) for position in positions],
            state.slot_start,
            first,
            seen,
            self.num_tokens - 1 if self.emits else len(tokens),
        )


def place_rows(group: Sequence[StepRow]) -> None:
    """Sets where each row begins in the pack of ``group``."""
    start = 0
    for row in group:
        row.start = start
        start += row.num_queries


def pack(group: Sequence[StepRow], device: torch.device) -> tuple[Tensor, PackedBatch]:
    """Token ids ``[T]`` and batch of rows that ``place_rows`` has placed."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rope_lengths: list[int] = []
    attention_rows: list[AttentionRow] = []
    for row in group:
        part = row.targets()
        size, start = len(part.tokens), part.cache_start
        tokens += part.tokens
        positions += part.positions
        rope_lengths += part.rope_lengths
        slots += range(start + part.context, start + part.context + size)
        mask = None if part.seen is None else upload(part.seen, device, torch.bool)
        attention_rows.append(AttentionRow(row.start, size, start, part.context + size, mask))
    packed = upload([tokens, positions, slots, rope_lengths], device)
    return packed[0], PackedBatch(packed[1], packed[2], attention_rows, packed[3])


def lora_segments(group: Sequence[StepRow]) -> list[LoraSegment]:
    """Segments of the pack."""
    segments: list[LoraSegment] = []
    end = 0
    for row in group:
        start, end = end, end + row.num_queries
        lora = row.state.fine_tune.lora
        if lora is None:
            continue
        if segments and segments[-1].adapter is lora and segments[-1].end == start:
            start = segments.pop().start
        segments.append(LoraSegment(lora, start, end))
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
