"""Draft tokens for a batch of sequences: chains, and EAGLE-2 dynamic trees (arXiv 2406.16858).

Each round begins with one *extension* pass that feeds the draft the target features of the tokens accepted since
the last round; its last output of a sequence predicts the first draft token. Further draft tokens come from passes
over the draft's own outputs. Their cache entries lie behind the extended length and are simply overwritten by the
next round.
"""

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from eda.attention import AttentionRow, PackedBatch
from eda.chains import cut_chains
from eda.draft import DraftModel
from eda.kernel_proposals import TREES_COVER, KernelProposals
from eda.kernels.draft import supports
from eda.lora import LoraAdapter
from eda.private import PrivateSegment
from eda.proposal import Proposal
from eda.sampling import LogitsContext, draft_scores, propose_chain_tokens
from eda.state import SequenceState
from eda.static.draft_passes import DraftPasses
from eda.static.replay import GraphCache
from eda.static.shapes import MAX_TOKENS
from eda.target import FineTune, TargetModel
from eda.transfers import read, upload
from eda.tree import GrowingTree, best_nodes, grow_tree, rank_nodes


class Proposer:
    """Runs the shared draft, with each row's own private module, embeddings and output head."""

    def __init__(
        self,
        draft: DraftModel,
        num_slots: int,
        generator: torch.Generator,
        graphs: GraphCache | None = None,
    ) -> None:
        self.draft = draft
        self.cache = draft.new_cache(num_slots + (0 if graphs is None else MAX_TOKENS))
        self._generator = generator
        self._device = draft.fc.weight.device
        self.reads_once = self._device.type != "cpu"
        """Whether chains are drafted to their full length and read together at the end. Where a device would have to
        wait for the host after each token, that is faster than stopping early."""
        # Keyed weakly: the rows of a fine-tune that is unloaded go with it.
        self._head_rows: WeakKeyDictionary[TargetModel | LoraAdapter, Tensor] = WeakKeyDictionary()
        self._fast = KernelProposals(draft, self.cache, generator) if supports(draft) else None
        self.passes: DraftPasses | None = None
        if graphs is not None and self._fast is None:
            scratch = self.cache.withhold(MAX_TOKENS)
            self.passes = DraftPasses(draft, self.cache, scratch, graphs, generator, self._rows_of_head)

    # extension

    def extend(
        self, states: Sequence[SequenceState], chain_lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Proposal] | None]:
        """Feeds all pending features to the draft, in one pass.

        A feature is consumed together with the token that follows it.

        Args:
            states: in draft order (see ``in_draft_order``); each has at least one pending feature.
            chain_lengths: draft tokens of each row, when all rows want chains (or nothing, 0).

        Returns:
            Each state's last output ``[B, H]``; and the chains, where drafting them in the same call was possible.
        """
        hidden_parts: list[Tensor] = []
        tokens: list[int] = []
        lengths: list[int] = []
        for state in states:
            features = state.take_pending_features()
            hidden_parts.append(features)
            lengths.append(features.shape[0])
            tokens += state.token_ids[state.draft_length + 1 : state.draft_length + 1 + features.shape[0]]
        features = hidden_parts[0] if len(hidden_parts) == 1 else torch.cat(hidden_parts)
        replayed = None if self.passes is None else self.passes.extend(states, features, lengths, tokens)
        known = [state.draft_length for state in states]
        for state, length in zip(states, lengths, strict=True):
            state.draft_length += length
        if replayed is not None:
            return replayed, None
        batch = self._pack(states, lengths, known, None)
        segments = _private_segments(states, lengths)
        if self._fast is not None:
            return self._fast.extend(states, chain_lengths, features, lengths, tokens, batch, segments)
        ids = upload(tokens, self._device)
        fused = self.draft.fuse(features, segments)
        hidden = self.draft(fused, self._embed(states, lengths, ids), batch, self.cache, segments)
        last = upload(lengths, self._device).cumsum(0) - 1
        return hidden[last], None

    # chains

    def propose_chains(
        self, states: Sequence[SequenceState], hidden: Tensor, lengths: Sequence[int]
    ) -> list[Proposal]:
        """Chains of ``lengths[b]`` tokens from the extension outputs ``hidden [B, H]``; states in draft order."""
        if self.passes is not None:
            replayed = self.passes.chains(states, hidden, lengths)
            if replayed is not None:
                return replayed
        if self.reads_once and not any(state.sampling.needs_history for state in states):
            return self._chains_read_once(states, hidden, lengths)
        paths: list[list[int]] = [[] for _ in states]
        probabilities: list[list[Tensor]] = [[] for _ in states]
        places = list(range(len(states)))
        wanted, joint = list(lengths), [0.0] * len(states)
        for step in range(max(lengths)):
            keep = [index for index, row in enumerate(places) if wanted[row] > step]
            if not keep:
                break
            if len(keep) < len(places):
                places = [places[index] for index in keep]
                hidden = hidden[upload(keep, self._device)]
            active = [states[row] for row in places]
            contexts = [_context(states[row], tuple(paths[row])) for row in places]
            logits = self._logits(active, [1] * len(active), hidden)
            columns, draft_probs = propose_chain_tokens(
                logits,
                contexts,
                [len(states[row].token_ids) + step for row in places],
                self.draft.draft_token_ids,
                self.draft.config.vocab_size,
                self._generator,
            )
            tokens = self.draft.draft_token_ids[columns]
            for index, (row, token) in enumerate(zip(places, tokens.tolist(), strict=True)):
                paths[row].append(token)
                if draft_probs is not None and states[row].is_sampled:
                    probabilities[row].append(draft_probs[index])
            if any(state.speculation.min_probability for state in active):
                chosen = logits.log_softmax(-1).gather(1, columns[:, None])[:, 0].tolist()
                for row, score in zip(places, chosen, strict=True):
                    joint[row] += score
                    if joint[row] < math.log(states[row].speculation.min_probability or 1e-30):
                        wanted[row] = (
                            step + 1
                        )  # the token stays: stopping never depends on one that is thrown away
            if step + 1 < max(wanted):
                hidden = self._step(active, hidden, tokens, step, ones=[1] * len(active))
        return [
            Proposal(
                path,
                list(range(len(path))),
                torch.stack(parts) if parts else None,
                self.draft.draft_token_ids if parts else None,
            )
            for path, parts in zip(paths, probabilities, strict=True)
        ]

    def _chains_read_once(
        self, states: Sequence[SequenceState], hidden: Tensor, lengths: Sequence[int]
    ) -> list[Proposal]:
        """``propose_chains`` of rows whose logits do not depend on what was drafted, without waiting for any token."""
        grid = (len(states), max(lengths))
        all_tokens = torch.zeros(grid, dtype=torch.int64, device=self._device)
        all_scores = torch.zeros(grid, dtype=torch.float32, device=self._device)
        probabilities: list[list[Tensor]] = [[] for _ in states]
        places = list(range(len(states)))
        index = torch.arange(len(states), device=self._device)
        for step in range(grid[1]):
            keep = [at for at, row in enumerate(places) if lengths[row] > step]
            if len(keep) < len(places):
                places = [places[at] for at in keep]
                kept = upload(keep, self._device)
                hidden, index = hidden[kept], index[kept]
            active = [states[row] for row in places]
            logits = self._logits(active, [1] * len(active), hidden)
            columns, draft_probs = propose_chain_tokens(
                logits,
                [_context(state, (), step) for state in active],
                [len(state.token_ids) + step for state in active],
                self.draft.draft_token_ids,
                self.draft.config.vocab_size,
                self._generator,
            )
            tokens = self.draft.draft_token_ids[columns]
            all_tokens[:, step].index_copy_(0, index, tokens)
            scores = logits.log_softmax(-1).gather(1, columns[:, None])[:, 0]
            all_scores[:, step].index_copy_(0, index, scores)
            for at, row in enumerate(places):
                if draft_probs is not None and states[row].is_sampled:
                    probabilities[row].append(draft_probs[at])
            if step + 1 < grid[1]:
                hidden = self._step(active, hidden, tokens, step, ones=[1] * len(active))
        read_tokens, read_scores = read(all_tokens, all_scores)
        return cut_chains(
            states,
            lengths,
            read_tokens,
            read_scores,
            [torch.stack(parts) if parts else None for parts in probabilities],
            self.draft.draft_token_ids,
        )

    def _step(
        self, states: Sequence[SequenceState], hidden: Tensor, tokens: Tensor, step: int, ones: list[int]
    ) -> Tensor:
        lengths = [state.draft_length + step for state in states]
        batch = self._pack(states, ones, lengths, None)
        segments = _private_segments(states, ones)
        return self._run(hidden, self._embed(states, ones, tokens), batch, segments)

    # trees

    def propose_trees(
        self, states: Sequence[SequenceState], hidden: Tensor, *, top_k: int, depth: int, num_nodes: int
    ) -> list[Proposal]:
        """Dynamic trees of one shape for all rows.

        Each has its ``num_nodes`` best nodes; see ``eda/tree.py``.
        """
        if self._fast is not None and all(state.sampling.demand in TREES_COVER for state in states):
            alone = [_private_segments([state], [1]) for state in states]
            return self._fast.trees(states, hidden, alone, top_k=top_k, depth=depth, num_nodes=num_nodes)
        if self.passes is not None:
            replayed = self.passes.trees(states, hidden, top_k=top_k, depth=depth, num_nodes=num_nodes)
            if replayed is not None:
                return replayed
        positions = [len(state.token_ids) for state in states]
        paths: list[list[tuple[int, ...]]] = [[()] for _ in states]

        def advance(hidden: Tensor, tokens: Tensor, ancestors: Tensor, level: int) -> Tensor:
            counts = [top_k] * len(states)
            lengths = [state.draft_length + top_k * (level - 1) for state in states]
            batch = self._pack(states, counts, lengths, ancestors, depth=level - 1)
            segments = _private_segments(states, counts)
            return self._run(hidden, self._embed(states, counts, tokens), batch, segments)

        def expand(hidden: Tensor, tree: GrowingTree | None, level: int) -> tuple[Tensor, Tensor]:
            nonlocal paths
            if tree is not None and any(state.sampling.needs_history for state in states):
                paths = self._grow_paths(paths, tree, level)
            return self._expand(states, hidden, paths, positions, top_k, level)

        tree = grow_tree(
            hidden, self.draft.draft_token_ids, top_k=top_k, depth=depth, expand=expand, advance=advance
        )
        tokens, joint, parents = tree.nodes()
        return best_nodes(*rank_nodes(joint, num_nodes), tokens, parents)

    def _expand(
        self,
        states: Sequence[SequenceState],
        hidden: Tensor,
        paths: list[list[tuple[int, ...]]],
        positions: list[int],
        top_k: int,
        level: int,
    ) -> tuple[Tensor, Tensor]:
        """The ``top_k`` best children of each node: log-probabilities and draft columns, both ``[B, nodes, top_k]``."""
        nodes = hidden.shape[1] if hidden.dim() == 3 else 1
        logits = self._logits(states, [nodes] * len(states), hidden.reshape(len(states) * nodes, -1))
        contexts = [
            _context(state, row_paths[min(node, len(row_paths) - 1)], level)
            for state, row_paths in zip(states, paths, strict=True)
            for node in range(nodes)
        ]
        node_positions = [position + level for position in positions for _ in range(nodes)]
        scores = draft_scores(
            logits, contexts, node_positions, self.draft.draft_token_ids, self.draft.config.vocab_size
        )
        values, columns = scores.view(len(states), nodes, -1).topk(top_k, dim=-1)
        return values, columns

    @staticmethod
    def _grow_paths(
        paths: list[list[tuple[int, ...]]], tree: GrowingTree, level: int
    ) -> list[list[tuple[int, ...]]]:
        """Drafted tokens on the way to each frontier node, for penalties that depend on them."""
        top_k = tree.frontier_tokens.shape[1]
        tokens = tree.frontier_tokens.tolist()
        if level == 1:
            return [[(token,) for token in row] for row in tokens]
        # The frontier's parents are nodes of the last frontier; their place in it is the candidate's row block.
        offset = sum(part.shape[1] for part in tree.parents[:-1])
        places = ((tree.frontier_ids - 1 - offset) // top_k).tolist()
        return [
            [(*old[place], token) for place, token in zip(row_places, row_tokens, strict=True)]
            for old, row_places, row_tokens in zip(paths, places, tokens, strict=True)
        ]

    # shared

    def _run(
        self, hidden: Tensor, embeddings: Tensor, batch: PackedBatch, segments: Sequence[PrivateSegment]
    ) -> Tensor:
        """One pass of the draft's layer."""
        if self._fast is not None:
            return self._fast.kernel.forward(hidden, embeddings, batch, segments)
        output: Tensor = self.draft(hidden, embeddings, batch, self.cache, segments)
        return output

    def _pack(
        self,
        states: Sequence[SequenceState],
        counts: Sequence[int],
        lengths: Sequence[int],
        ancestors: Tensor | None,
        depth: int = 0,
    ) -> PackedBatch:
        """Places ``counts[b]`` new tokens of each row behind its ``lengths[b]`` cached ones."""
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
                positions.extend([state.draft_length + depth] * count)
        packed = upload([positions, slots], self._device)
        return PackedBatch(packed[0], packed[1], rows)

    def _embed(self, states: Sequence[SequenceState], counts: Sequence[int], tokens: Tensor) -> Tensor:
        parts = [fine_tune.embed(tokens[start:end]) for fine_tune, start, end in _runs(states, counts)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _logits(self, states: Sequence[SequenceState], counts: Sequence[int], hidden: Tensor) -> Tensor:
        fast = self._fast
        parts = [
            self.draft.logits(hidden[start:end], self._rows_of_head(fine_tune))
            if fast is None
            else fast.kernel.logits(hidden[start:end], fast.head(fine_tune))
            for fine_tune, start, end in _runs(states, counts)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows_of_head(self, fine_tune: FineTune) -> Tensor:
        """The fine-tune's output rows of the draft vocabulary, gathered once."""
        rows = self._head_rows.get(fine_tune.output_owner)
        if rows is None:
            rows = fine_tune.head_rows(self.draft.draft_token_ids)
            self._head_rows[fine_tune.output_owner] = rows
        return rows


def in_draft_order(states: Sequence[SequenceState]) -> list[int]:
    """Indices of ``states`` so that equal output layers and equal private modules stand together."""
    return sorted(
        range(len(states)),
        key=lambda index: (id(states[index].fine_tune.output_owner), id(states[index].private)),
    )


def _runs(states: Sequence[SequenceState], counts: Sequence[int]) -> list[tuple[FineTune, int, int]]:
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


def _private_segments(states: Sequence[SequenceState], counts: Sequence[int]) -> list[PrivateSegment]:
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


def _context(state: SequenceState, path: tuple[int, ...], level: int | None = None) -> LogitsContext:
    """What processing the draft's logits needs to know after drafting ``path``."""
    drafted = len(path) if level is None else level
    return LogitsContext(state.sampling, state.history, path, state.num_generated + drafted)
