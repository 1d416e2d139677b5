"""The draft in C++: its single passes, and whole chains and trees in one call where a row demands little."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from eda.backends.base import Drafter, DraftRequest
from eda.backends.cpu.draft import DraftHead, DraftKernel
from eda.backends.cpu.library import DraftRow
from eda.backends.cpu.verifier import sampling_of
from eda.backends.drafting import Proposer, Reading, place_tokens, private_segments
from eda.backends.eager.drafter import places_to_read
from eda.models.attention import PackedBatch
from eda.models.cache import KVCache
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune, FineTuneCache
from eda.models.private import PrivateSegment
from eda.models.target import TapLayers
from eda.sampling.draws import draw_uniforms
from eda.sampling.params import SamplingDemand
from eda.speculation.kinds import Chain
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState

# Log-probabilities are the target's: no draft has anything to do with them.
CHAINS_COVER = (
    SamplingDemand.DRAWS | SamplingDemand.TEMPERATURE | SamplingDemand.CUTS | SamplingDemand.LOGPROBS
)
"""Of rows whose chains are drafted in one call."""
TREES_COVER = CHAINS_COVER
"""Of rows whose trees grow by the draft's own probabilities, before temperature and cuts (``draft_scores``)."""


def _draft_head(draft: DraftModel, fine_tune: FineTune) -> DraftHead:
    """The fine-tune's output rows of the draft vocabulary and its embeddings, laid out."""
    embedding: Tensor = fine_tune.model.embedding
    if fine_tune.output_owner is not fine_tune.model:
        embedding = fine_tune.embed(torch.arange(embedding.shape[0]))
    return DraftHead(fine_tune.head_rows(draft.draft_token_ids), embedding)


class CpuDraftLayer:
    """A draft's layer in C++; the draft's keys and values are in ``cache``, its own."""

    def __init__(self, draft: DraftModel, cache: KVCache, generator: torch.Generator) -> None:
        self.cache = cache
        self._kernel = DraftKernel(draft, cache)
        self._draft = draft
        self._generator = generator
        self._head = FineTuneCache(partial(_draft_head, draft))

    def extend(self, reading: Reading, batch: PackedBatch, segments: Sequence[PrivateSegment]) -> Tensor:
        """See ``DraftLayer``."""
        rows = self._rows(reading.states, [0] * len(reading.states), reading.lengths)
        return self._kernel.extend(rows, reading.features, reading.tokens, batch, segments)[0]

    def step(
        self, hidden: Tensor, embeddings: Tensor, batch: PackedBatch, segments: Sequence[PrivateSegment]
    ) -> Tensor:
        """See ``DraftLayer``."""
        return self._kernel.forward(hidden, embeddings, batch, segments)

    def logits(self, hidden: Tensor, fine_tune: FineTune) -> Tensor:
        """See ``DraftLayer``."""
        return self._kernel.logits(hidden, self._head(fine_tune))

    def extend_and_draft(self, reading: Reading, lengths: Sequence[int]) -> list[Proposal]:
        """An extension with the chains from it, of at most ``lengths[b]`` tokens, in one call."""
        states = reading.states
        batch = place_tokens(states, reading.lengths, reading.known, reading.features.device)
        rows = self._rows(states, lengths, reading.lengths)
        uniforms = None
        if any(state.sampling.draws_freely for state in states):
            count = len(states) * max(lengths)
            uniforms = draw_uniforms(count, self._generator, reading.features.device).view(len(states), -1)
            for row, state in zip(rows, states, strict=True):
                if state.sampling.draws_freely:
                    row.sampling = sampling_of(state.sampling)
        segments = private_segments(states, reading.lengths)
        _, chains, probabilities = self._kernel.extend(
            rows, reading.features, reading.tokens, batch, segments, uniforms
        )
        return [
            Proposal.chain(chain, probabilities[place, : len(chain)], self._draft.draft_token_ids)
            if probabilities is not None and states[place].sampling.draws_freely and chain
            else Proposal.chain(chain)
            for place, chain in enumerate(chains)
        ]

    def trees(
        self, states: Sequence[SequenceState], hidden: Tensor, *, top_k: int, depth: int, num_nodes: int
    ) -> list[Proposal]:
        """As ``Proposer.propose_trees``, one call for each row."""
        rows = self._rows(states, [depth] * len(states), [0] * len(states))
        return [
            Proposal(*self._kernel.tree(row, start, private_segments([state], [1]), top_k, num_nodes))
            for row, start, state in zip(rows, hidden, states, strict=True)
        ]

    def _rows(
        self, states: Sequence[SequenceState], steps: Sequence[int], lengths: Sequence[int]
    ) -> list[DraftRow]:
        rows = []
        start = 0
        for state, num_steps, length in zip(states, steps, lengths, strict=True):
            head = self._head(state.fine_tune)
            row = DraftRow(state.slot_start, state.num_draft_cached, num_steps, start, length)
            row.min_probability = state.min_probability
            row.head, row.embedding = head.packed.pointer, head.embedding.data_ptr()
            if state.private is not None:
                private = self._kernel.private(state.private)
                row.lora = private.attention
                row.private_gate_up, row.private_down = private.gate_up, private.down
            rows.append(row)
            start += length
        return rows


class CpuProposer:
    """Grows trees in C++ where all of their rows allow it; ``inner`` does everything else."""

    def __init__(self, inner: Proposer, layer: CpuDraftLayer) -> None:
        self.inner = inner
        self.layer = layer

    def extend(self, reading: Reading) -> Tensor:
        """See ``Proposer``."""
        return self.inner.extend(reading)

    def propose_chains(
        self, states: Sequence[SequenceState], hidden: Tensor, lengths: Sequence[int]
    ) -> list[Proposal]:
        """See ``Proposer``."""
        return self.inner.propose_chains(states, hidden, lengths)

    def propose_trees(
        self, states: Sequence[SequenceState], hidden: Tensor, *, top_k: int, depth: int, num_nodes: int
    ) -> list[Proposal]:
        """See ``Proposer``."""
        covered = all(state.sampling.demand in TREES_COVER for state in states)
        trees = self.layer.trees if covered else self.inner.propose_trees
        return trees(states, hidden, top_k=top_k, depth=depth, num_nodes=num_nodes)


class CpuDrafter:
    """Drafts whole rounds of chains in one call, and hands on rounds with any other row to ``inner``."""

    def __init__(self, inner: Drafter, layer: CpuDraftLayer) -> None:
        self.inner = inner
        self.layer = layer

    @property
    def taps(self) -> TapLayers | None:
        """See ``Drafter``."""
        return self.inner.taps

    def draft(self, requests: Sequence[DraftRequest]) -> list[Proposal | None]:
        """See ``Drafter``."""
        places = places_to_read(requests)
        if not places or not all(_is_covered(requests[place]) for place in places):
            return self.inner.draft(requests)
        proposals: list[Proposal | None] = [None] * len(requests)
        reading = Reading.of([requests[place].state for place in places])
        chains = self.layer.extend_and_draft(reading, [requests[place].length for place in places])
        for place, chain in zip(places, chains, strict=True):
            proposals[place] = chain if chain.token_ids else None
        return proposals


def _is_covered(request: DraftRequest) -> bool:
    if not request.length:
        return True
    state = request.state
    return isinstance(state.speculation, Chain) and state.sampling.demand in CHAINS_COVER
