"""The host's side of the draft in fixed shapes: which batches it takes, filling buffers, reading results."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eda.backends.drafting import Proposer, Reading
from eda.backends.recorded.draft_functions import (
    ChainBuffers,
    DraftOwners,
    StaticDraft,
    TreeBuffers,
    chain_function,
    extension_function,
    tree_function,
)
from eda.backends.recorded.replay import GraphCache, Recordable
from eda.backends.recorded.shapes import CHAINS, EXTENSIONS, MAX_TOKENS, ROWS, Inputs, num_keys, round_up
from eda.models.cache import KVCache
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.sampling.draws import draw_uniforms
from eda.sampling.params import SamplingDemand
from eda.speculation.chains import cut_chains
from eda.speculation.kinds import Chain, Speculation, Tree
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState
from eda.speculation.tree import best_nodes
from eda.transfers import read, upload

# Log-probabilities are the target's: no draft has anything to do with them.
CHAINS_COVER = SamplingDemand.DRAWS | SamplingDemand.TEMPERATURE | SamplingDemand.LOGPROBS
"""Of rows whose chains are recorded."""
TREES_COVER = CHAINS_COVER | SamplingDemand.CUTS
"""Of rows whose trees are recorded. They grow by the draft's probabilities before temperature and cuts."""
_ROW_INPUTS = ("starts", "lengths", "steps", "scratch")


class RecordedProposer:
    """Extensions, chains and trees as recordings, for rows that share output layer and private module.

    What there is no recording for is handed on.

    Args:
        inner: does what is not recorded.
        scratch: the first of ``MAX_TOKENS`` cache slots that belong to no sequence.
        head_rows: gives a fine-tune's output rows of the draft vocabulary.
    """

    def __init__(
        self,
        inner: Proposer,
        draft: DraftModel,
        cache: KVCache,
        scratch: int,
        graphs: GraphCache,
        generator: torch.Generator,
        head_rows: Callable[[FineTune], Tensor],
    ) -> None:
        self.inner = inner
        self._draft = draft
        self._cache = cache
        self._scratch = scratch
        self._graphs = graphs
        self._generator = generator
        self._head_rows = head_rows
        self._device = draft.fc.weight.device
        self._hidden: dict[int, Tensor] = {}
        self._extensions: dict[tuple[int, int], Inputs] = {}
        self._features: Tensor | None = None
        self._chains: dict[tuple[int, int], ChainBuffers] = {}
        self._trees: dict[tuple[int, int, int, int], TreeBuffers] = {}

    # extension

    def extend(self, reading: Reading) -> Tensor:
        """See ``Proposer``; in memory of its own."""
        hidden = self._replay_extension(reading)
        return self.inner.extend(reading) if hidden is None else hidden

    def _replay_extension(self, reading: Reading) -> Tensor | None:
        states, features, lengths = reading.states, reading.features, reading.lengths
        owners, count = _owners(states), round_up(len(states), ROWS)
        width = round_up(max(lengths), EXTENSIONS)
        if owners is None or count is None or width is None or count * width > MAX_TOKENS:
            return None
        longest = max(known + length for known, length in zip(reading.known, lengths, strict=True))
        keys = num_keys(longest, count)
        if keys is None:
            return None
        key = self._graphs.key("draft extension", (count, width, keys), owners.references())
        if not self._graphs.wants(key):
            return None
        buffer, inputs = self._extension_buffers(features.shape[1], features.dtype, count, width)
        self._load_extension(inputs, reading, count, width)
        places = inputs["places"].narrow(0, 0, features.shape[0])
        buffer.index_copy_(0, places, features.to(buffer.dtype))
        if not self._graphs.run(key, self._extension_maker(owners, count, width, keys)):
            return None
        return self._hidden_of(count).narrow(0, 0, len(states)).clone()

    def _extension_maker(
        self, owners: DraftOwners, count: int, width: int, keys: int
    ) -> Callable[[], Recordable]:
        def make() -> Recordable:
            inputs, hidden = self._extensions[count, width], self._hidden_of(count)
            assert self._features is not None
            features = self._features.narrow(0, 0, count * width)
            return extension_function(self._static(owners), inputs, features, hidden, keys), (hidden,)

        return make

    def _extension_buffers(
        self, num_features: int, dtype: torch.dtype, count: int, width: int
    ) -> tuple[Tensor, Inputs]:
        if self._features is None:
            self._features = torch.zeros(MAX_TOKENS, num_features, dtype=dtype, device=self._device)
        inputs = self._extensions.get((count, width))
        if inputs is None:
            grid, total = (count, width), (count * width,)
            shapes = {"tokens": total, "positions": grid, "slots": grid, "places": total}
            shapes |= dict.fromkeys(("starts", "contexts", "lengths", "last"), (count,))
            inputs = self._extensions[count, width] = Inputs(shapes, self._device)
        return self._features.narrow(0, 0, count * width), inputs

    def _load_extension(
        self,
        inputs: Inputs,
        reading: Reading | None,
        count: int,
        width: int,
    ) -> None:
        """``None`` fills the inputs with padding alone."""
        names = ("tokens", "positions", "slots", "places", "starts", "contexts", "lengths", "last")
        values: dict[str, list[int]] = {name: [] for name in names}
        rows = (
            [] if reading is None else list(zip(reading.states, reading.lengths, reading.known, strict=True))
        )
        tokens = [] if reading is None else reading.tokens
        taken = 0
        for place in range(count):
            first = place * width
            scratch = self._scratch + first
            size, known, start = 0, 0, scratch
            if place < len(rows):
                state, size, known = rows[place]
                start = state.slot_start
            values["tokens"] += [*tokens[taken : taken + size], *([0] * (width - size))]
            values["positions"] += [*range(known, known + size), *([0] * (width - size))]
            values["slots"] += range(start + known, start + known + size)
            values["slots"] += range(scratch + size, scratch + width)
            values["places"] += range(first, first + size)
            values["starts"].append(start)
            values["contexts"].append(known)
            values["lengths"].append(max(1, known + size))
            values["last"].append(first + max(0, size - 1))
            taken += size
        inputs.load(values)

    # chains

    def propose_chains(
        self, states: Sequence[SequenceState], hidden: Tensor, lengths: Sequence[int]
    ) -> list[Proposal]:
        """See ``Proposer``. Recorded chains are drafted to their full length and cut afterwards."""
        chains = self._replay_chains(states, hidden, lengths)
        return self.inner.propose_chains(states, hidden, lengths) if chains is None else chains

    def _replay_chains(
        self, states: Sequence[SequenceState], hidden: Tensor, lengths: Sequence[int]
    ) -> list[Proposal] | None:
        owners, count = _owners(states), round_up(len(states), ROWS)
        num_steps = round_up(max(lengths), CHAINS)
        if owners is None or count is None or num_steps is None:
            return None
        if not all(state.sampling.demand in CHAINS_COVER for state in states):
            return None
        longest = max(state.num_draft_cached + length for state, length in zip(states, lengths, strict=True))
        keys = num_keys(longest, count)
        if keys is None:
            return None
        drawn = [state.sampling.draws_freely for state in states]
        shape = (count, num_steps, keys, any(drawn))
        key = self._graphs.key("draft chain", shape, owners.references())
        if not self._graphs.wants(key):
            return None
        buffers = self._chain_buffers(count, num_steps)
        buffers.inputs.load(self._row_values(states, lengths, count, slots_per_row=1))
        buffers.hidden.narrow(0, 0, len(states)).copy_(hidden)
        if any(drawn):
            padding = [0.0] * (count - len(states))
            temperatures = [
                state.sampling.temperature if state.sampling.draws_freely else 1.0 for state in states
            ]
            settings = [
                [*temperatures, *(1.0 for _ in padding)],
                [*(float(flag) for flag in drawn), *padding],
            ]
            on_device = upload(settings, self._device, torch.float32)
            buffers.temperatures.copy_(on_device[0])
            buffers.is_drawn.copy_(on_device[1] > 0.0)
            uniforms = draw_uniforms(count * num_steps, self._generator, self._device)
            buffers.uniforms.copy_(uniforms.view(count, num_steps))
        if not self._graphs.run(key, self._chain_maker(owners, buffers, keys, draws=any(drawn))):
            return None
        probabilities = buffers.probabilities.clone() if any(drawn) else None
        tokens, scores = read(buffers.tokens, buffers.scores)
        return cut_chains(
            states,
            lengths,
            tokens,
            scores,
            [
                probabilities[:, row] if probabilities is not None and is_drawn else None
                for row, is_drawn in enumerate(drawn)
            ],
            self._draft.draft_token_ids,
        )

    def _chain_maker(
        self, owners: DraftOwners, buffers: ChainBuffers, keys: int, *, draws: bool
    ) -> Callable[[], Recordable]:
        def make() -> Recordable:
            outputs = (buffers.tokens, buffers.scores)
            return chain_function(self._static(owners), buffers, keys, draws=draws), outputs

        return make

    def _chain_buffers(self, count: int, num_steps: int) -> ChainBuffers:
        buffers = self._chains.get((count, num_steps))
        if buffers is None:
            grid, device = (count, num_steps), self._device
            columns = self._draft.config.draft_vocab_size
            buffers = self._chains[count, num_steps] = ChainBuffers(
                Inputs(dict.fromkeys(_ROW_INPUTS, (count,)), device),
                self._hidden_of(count),
                torch.zeros(grid, dtype=torch.int64, device=device),
                torch.zeros(grid, dtype=torch.float32, device=device),
                torch.ones(count, dtype=torch.float32, device=device),
                torch.zeros(count, dtype=torch.bool, device=device),
                torch.zeros(grid, dtype=torch.float64, device=device),
                torch.zeros(num_steps, count, columns, dtype=torch.float32, device=device),
            )
        return buffers

    # trees

    def propose_trees(
        self, states: Sequence[SequenceState], hidden: Tensor, *, top_k: int, depth: int, num_nodes: int
    ) -> list[Proposal]:
        """See ``Proposer``."""
        trees = self._replay_trees(states, hidden, top_k, depth, num_nodes)
        if trees is None:
            return self.inner.propose_trees(states, hidden, top_k=top_k, depth=depth, num_nodes=num_nodes)
        return trees

    def _replay_trees(
        self, states: Sequence[SequenceState], hidden: Tensor, top_k: int, depth: int, num_nodes: int
    ) -> list[Proposal] | None:
        owners, count = _owners(states), round_up(len(states), ROWS)
        if owners is None or count is None or count * top_k > MAX_TOKENS:
            return None
        if not all(state.sampling.demand in TREES_COVER for state in states):
            return None
        keys = num_keys(max(state.num_draft_cached for state in states) + top_k * depth, count)
        if keys is None:
            return None
        shape = (count, top_k, depth, num_nodes)
        key = self._graphs.key("draft tree", (*shape, keys), owners.references())
        if not self._graphs.wants(key):
            return None
        buffers = self._tree_buffers(*shape)
        buffers.inputs.load(self._row_values(states, [depth] * len(states), count, slots_per_row=top_k))
        buffers.hidden.narrow(0, 0, len(states)).copy_(hidden)
        if not self._graphs.run(key, self._tree_maker(owners, buffers, keys)):
            return None
        proposals = best_nodes(buffers.values, buffers.order, buffers.tokens, buffers.parents)
        return proposals[: len(states)]

    def _tree_maker(self, owners: DraftOwners, buffers: TreeBuffers, keys: int) -> Callable[[], Recordable]:
        def make() -> Recordable:
            return tree_function(self._static(owners), buffers, keys), (buffers.values,)

        return make

    def _tree_buffers(self, count: int, top_k: int, depth: int, num_nodes: int) -> TreeBuffers:
        key = (count, top_k, depth, num_nodes)
        buffers = self._trees.get(key)
        if buffers is None:
            nodes = top_k + (depth - 1) * top_k * top_k
            ranked = (count, min(num_nodes, nodes))
            buffers = self._trees[key] = TreeBuffers(
                Inputs(dict.fromkeys(_ROW_INPUTS, (count,)), self._device),
                self._hidden_of(count),
                torch.zeros(count, nodes, dtype=torch.int64, device=self._device),
                torch.zeros(count, nodes, dtype=torch.int64, device=self._device),
                torch.zeros(ranked, dtype=torch.float32, device=self._device),
                torch.zeros(ranked, dtype=torch.int64, device=self._device),
                top_k,
                depth,
            )
        return buffers

    # before the first request

    def prepare(self, fine_tune: FineTune, num_rows: int, speculation: Speculation, keys: int) -> None:
        """Makes the recordings of a round that drafts greedily without a private module, where that is a shape."""
        owners, count = DraftOwners.of(fine_tune, None), round_up(num_rows, ROWS)
        keys_of_row = None if count is None else num_keys(keys, count)
        references = owners.references()
        if not isinstance(speculation, Chain | Tree) or count is None or keys_of_row is None:
            return
        depth = speculation.length if isinstance(speculation, Chain) else speculation.depth
        if depth == 0:
            return
        width = round_up(depth + 1, EXTENSIONS)
        if width is not None and count * width <= MAX_TOKENS:
            key = self._graphs.key("draft extension", (count, width, keys_of_row), references)
            if self._graphs.lacks(key):
                num_features = self._draft.config.num_features
                _, inputs = self._extension_buffers(num_features, fine_tune.model.dtype, count, width)
                self._load_extension(inputs, None, count, width)
                self._graphs.run(key, self._extension_maker(owners, count, width, keys_of_row))
        num_steps = round_up(depth, CHAINS)
        if isinstance(speculation, Chain) and num_steps is not None:
            key = self._graphs.key("draft chain", (count, num_steps, keys_of_row, False), references)
            if self._graphs.lacks(key):
                chain = self._chain_buffers(count, num_steps)
                chain.inputs.load(self._row_values((), (), count, slots_per_row=1))
                self._graphs.run(key, self._chain_maker(owners, chain, keys_of_row, draws=False))
        if isinstance(speculation, Tree) and count * speculation.top_k <= MAX_TOKENS:
            top_k = speculation.top_k
            shape = (count, top_k, depth, speculation.num_nodes)
            key = self._graphs.key("draft tree", (*shape, keys_of_row), references)
            if self._graphs.lacks(key):
                tree = self._tree_buffers(*shape)
                tree.inputs.load(self._row_values((), (), count, slots_per_row=top_k))
                self._graphs.run(key, self._tree_maker(owners, tree, keys_of_row))

    # shared

    def _static(self, owners: DraftOwners) -> StaticDraft:
        self._head_rows(owners.fine_tune())  # gathered before a recording begins, and kept elsewhere
        return StaticDraft(self._draft, self._cache, owners, self._head_rows)

    def _hidden_of(self, count: int) -> Tensor:
        hidden = self._hidden.get(count)
        if hidden is None:
            weight = self._draft.fc.weight
            hidden = self._hidden[count] = weight.new_zeros(count, weight.shape[0])
        return hidden

    def _row_values(
        self, states: Sequence[SequenceState], steps: Sequence[int], count: int, *, slots_per_row: int
    ) -> dict[str, list[int]]:
        scratch = [self._scratch + place * slots_per_row for place in range(count)]
        return {
            "starts": [state.slot_start for state in states],
            "lengths": [state.num_draft_cached for state in states],
            "steps": list(steps),
            "scratch": scratch,
        }


def _owners(states: Sequence[SequenceState]) -> DraftOwners | None:
    """The weights that all rows share besides the draft's own; ``None`` where they do not share them."""
    first = states[0]
    for state in states[1:]:
        if state.private is not first.private:
            return None
        if state.fine_tune.output_owner is not first.fine_tune.output_owner:
            return None
    return DraftOwners.of(first.fine_tune, first.private)
