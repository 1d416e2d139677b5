"""Draft tokens for a batch of sequences: chains, and EAGLE-2 dynamic trees (arXiv 2406.16858).

Each round begins with one *extension* pass that feeds the draft the target features of the tokens accepted since
the last round; its last output of a sequence predicts the first draft token. Further draft tokens come from passes
over the draft's own outputs. Their cache entries lie behind the extended length and are simply overwritten by the
next round.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eda.backends.drafting import DraftLayer, Reading, embed, output_runs, place_tokens, private_segments
from eda.models.attention import PackedBatch
from eda.models.draft import DraftModel
from eda.sampling.draws import draft_scores, propose_chain_tokens
from eda.sampling.processors import LogitsContext
from eda.speculation.chains import cut_chains
from eda.speculation.proposal import Proposal
from eda.speculation.sequence import SequenceState
from eda.speculation.tree import GrowingTree, best_nodes, grow_tree, rank_nodes
from eda.transfers import read, upload


class EagerProposer:
    """Drafts token by token and level by level, on single passes of ``layer``.

    Each row has its own private module, embeddings and output head.
    """

    def __init__(self, draft: DraftModel, layer: DraftLayer, generator: torch.Generator) -> None:
        self.draft = draft
        self.layer = layer
        self._generator = generator
        self._device = draft.fc.weight.device
        self.reads_once = self._device.type != "cpu"
        """Whether chains are drafted to their full length and read together at the end. Where a device would have to
        wait for the host after each token, that is faster than stopping early."""

    def extend(self, reading: Reading) -> Tensor:
        """See ``Proposer``."""
        batch = place_tokens(reading.states, reading.lengths, reading.known, self._device)
        return self.layer.extend(reading, batch, private_segments(reading.states, reading.lengths))

    # chains

    def propose_chains(
        self, states: Sequence[SequenceState], hidden: Tensor, lengths: Sequence[int]
    ) -> list[Proposal]:
        """See ``Proposer``."""
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
                if draft_probs is not None and states[row].sampling.draws_freely:
                    probabilities[row].append(draft_probs[index])
            if any(state.min_probability for state in active):
                chosen = logits.log_softmax(-1).gather(1, columns[:, None])[:, 0].tolist()
                for row, score in zip(places, chosen, strict=True):
                    joint[row] += score
                    if joint[row] < math.log(states[row].min_probability or 1e-30):
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
                if draft_probs is not None and states[row].sampling.draws_freely:
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
        lengths = [state.num_draft_cached + step for state in states]
        return self._pass(states, ones, hidden, tokens, place_tokens(states, ones, lengths, self._device))

    # trees

    def propose_trees(
        self, states: Sequence[SequenceState], hidden: Tensor, *, top_k: int, depth: int, num_nodes: int
    ) -> list[Proposal]:
        """See ``Proposer``."""
        positions = [len(state.token_ids) for state in states]
        paths: list[list[tuple[int, ...]]] = [[()] for _ in states]

        def advance(hidden: Tensor, tokens: Tensor, ancestors: Tensor, level: int) -> Tensor:
            counts = [top_k] * len(states)
            lengths = [state.num_draft_cached + top_k * (level - 1) for state in states]
            batch = place_tokens(states, counts, lengths, self._device, ancestors, level - 1)
            return self._pass(states, counts, hidden, tokens, batch)

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

    def _pass(
        self,
        states: Sequence[SequenceState],
        counts: Sequence[int],
        hidden: Tensor,
        tokens: Tensor,
        batch: PackedBatch,
    ) -> Tensor:
        """One pass over drafted ``tokens``, ``counts[b]`` of each row."""
        return self.layer.step(hidden, embed(states, counts, tokens), batch, private_segments(states, counts))

    def _logits(self, states: Sequence[SequenceState], counts: Sequence[int], hidden: Tensor) -> Tensor:
        parts = [
            self.layer.logits(hidden[start:end], fine_tune)
            for fine_tune, start, end in output_runs(states, counts)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _context(state: SequenceState, path: tuple[int, ...], level: int | None = None) -> LogitsContext:
    """What processing the draft's logits needs to know after drafting ``path``."""
    drafted = len(path) if level is None else level
    return LogitsContext(state.sampling, state.history, path, state.num_generated + drafted)
