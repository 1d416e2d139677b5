"""The proposer's side of the C++ draft: which drafts it can make in one call, and what that call needs."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from eda.attention import PackedBatch
from eda.draft import DraftModel
from eda.kernels.draft import DraftHead, DraftKernel
from eda.kernels.library import DraftRow
from eda.kernels.verification import sampling_of
from eda.kv_cache import KVCache
from eda.lora import LoraAdapter
from eda.private import PrivateSegment
from eda.proposal import Proposal
from eda.sampling import draw_uniforms
from eda.sampling_params import SamplingDemand
from eda.state import SequenceState
from eda.target import FineTune, TargetModel

# Log-probabilities are the target's: no draft has anything to do with them.
CHAINS_COVER = (
    SamplingDemand.DRAWS | SamplingDemand.TEMPERATURE | SamplingDemand.CUTS | SamplingDemand.LOGPROBS
)
"""Of rows whose chains are drafted in one call."""
TREES_COVER = SamplingDemand.DRAWS | SamplingDemand.LOGPROBS
"""Of rows whose trees grow by the draft's own probabilities."""


class KernelProposals:
    """Whole chains and trees of rows whose drafts follow the draft's own probabilities; single passes of all others."""

    def __init__(self, draft: DraftModel, cache: KVCache, generator: torch.Generator) -> None:
        self.kernel = DraftKernel(draft, cache)
        self._draft = draft
        self._generator = generator
        # Keyed weakly: the rows of a fine-tune that is unloaded go with it.
        self._heads: WeakKeyDictionary[TargetModel | LoraAdapter, DraftHead] = WeakKeyDictionary()

    def extend(
        self,
        states: Sequence[SequenceState],
        chain_lengths: Sequence[int] | None,
        features: Tensor,
        lengths: Sequence[int],
        tokens: Sequence[int],
        batch: PackedBatch,
        segments: Sequence[PrivateSegment],
    ) -> tuple[Tensor, list[Proposal] | None]:
        """The extension pass over ``lengths[b]`` features of each row, with the chains where that is possible.

        Arguments and results as in ``Proposer.extend``; ``tokens`` are the ids behind the ``features``.
        """
        steps = chain_lengths
        if steps is None or not all(
            state.sampling.demand in CHAINS_COVER or not count
            for state, count in zip(states, steps, strict=True)
        ):
            steps = None
        rows = self._rows(states, steps or [0] * len(states), lengths)
        drawn = [steps is not None and state.is_sampled for state in states]
        uniforms = None
        if any(drawn):
            count = len(states) * max(row.num_steps for row in rows)
            uniforms = draw_uniforms(count, self._generator, features.device).view(len(states), -1)
            for row, state, is_drawn in zip(rows, states, drawn, strict=True):
                if is_drawn:
                    row.sampling = sampling_of(state.sampling)
        hidden, chains, probabilities = self.kernel.extend(rows, features, tokens, batch, segments, uniforms)
        if steps is None:
            return hidden, None
        if probabilities is None:
            return hidden, [Proposal.chain(chain) for chain in chains]
        return hidden, [
            Proposal.chain(chain, probabilities[place, : len(chain)], self._draft.draft_token_ids)
            if drawn[place] and chain
            else Proposal.chain(chain)
            for place, chain in enumerate(chains)
        ]

    def trees(
        self,
        states: Sequence[SequenceState],
        hidden: Tensor,
        segments: Sequence[Sequence[PrivateSegment]],
        *,
        top_k: int,
        depth: int,
        num_nodes: int,
    ) -> list[Proposal]:
        """Arguments as in ``Proposer.propose_trees``; ``segments`` of each row alone."""
        rows = self._rows(states, [depth] * len(states), [0] * len(states))
        return [
            Proposal(*self.kernel.tree(row, start, part, top_k, num_nodes))
            for row, start, part in zip(rows, hidden, segments, strict=True)
        ]

    def head(self, fine_tune: FineTune) -> DraftHead:
        """The fine-tune's output rows of the draft vocabulary and its embeddings, laid out once."""
        owner = fine_tune.output_owner
        head = self._heads.get(owner)
        if head is None:
            embedding: Tensor = fine_tune.model.embedding
            if owner is not fine_tune.model:
                embedding = fine_tune.embed(torch.arange(embedding.shape[0]))
            head = self._heads[owner] = DraftHead(fine_tune.head_rows(self._draft.draft_token_ids), embedding)
        return head

    def _rows(
        self, states: Sequence[SequenceState], steps: Sequence[int], lengths: Sequence[int]
    ) -> list[DraftRow]:
        rows = []
        start = 0
        for state, num_steps, length in zip(states, steps, lengths, strict=True):
            head = self.head(state.fine_tune)
            row = DraftRow(state.slot_start, state.draft_length, num_steps, start, length)
            row.min_probability = state.speculation.min_probability
            row.head, row.embedding = head.packed.pointer, head.embedding.data_ptr()
            if state.private is not None:
                private = self.kernel.private(state.private)
                row.lora = private.attention
                row.private_gate_up, row.private_down = private.gate_up, private.down
            rows.append(row)
            start += length
        return rows
