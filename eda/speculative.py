"""The speculative step: propose -> verify -> accept, for a batch of sequences.

One ``SpeculativeDecoder.step`` runs the draft for every row that speculates, one target pass over all rows (prompt
chunks included), and accepts what the target agrees with. Plain decoding is the same step without a proposal. The
output is the target's own, whatever the draft: see ``eda/verification.py`` for the rules.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.draft import DraftModel
from eda.errors import MismatchError
from eda.kernels.parallel import kernel_threads_only
from eda.kv_cache import KVCache
from eda.packing import StepRow, lora_segments, pack, place_rows
from eda.proposer import Proposer, in_draft_order
from eda.sampling import TokenHistory
from eda.sampling_params import SamplingDemand
from eda.state import SequenceState, Speculation
from eda.static.choice import GraphChoice, graph_cache
from eda.static.shapes import MAX_TOKENS, WARM_UP_KEYS
from eda.static.target_pass import TargetPasses
from eda.target import FineTune, TargetModel, TargetOutput
from eda.transfers import upload
from eda.verification import TokenLogprobs, VerificationRow, verify

__all__ = ["ScheduledRow", "SequenceState", "Speculation", "SpeculativeDecoder", "StepResult"]

MAX_PENDING_BYTES = 4 << 20
"""A sequence whose drafting is paused keeps so many bytes of features before the draft reads them anyway: reading costs
the same later, and nothing where drafting never begins again."""


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """A sequence's part of one step: its next ``num_tokens`` uncomputed tokens (1 when decoding)."""

    state: SequenceState
    num_tokens: int = 1


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did for one row."""

    token_ids: list[int]
    """Emitted tokens; none in the middle of a prompt."""
    logprobs: list[TokenLogprobs] | None = None
    num_draft_tokens: int = 0
    num_accepted: int = 0


class SpeculativeDecoder:
    """Decodes batches of sequences of one target family with one shared draft.

    Args:
        target: the base model; fine-tunes with weights of their own must have its shapes.
        draft: the shared draft, or ``None`` for plain decoding only.
        num_slots: size of the key/value cache in tokens.
        seed: of the generator that unseeded sampling uses; ``None`` takes a fresh one.
        block_verification: accept sampled chains as blocks (Sun et al. 2024).
        graphs: how small passes are recorded and replayed: "auto" (CUDA graphs on a GPU), "off", or another backend.

    Raises:
        MismatchError: the draft was made for a target of other sizes.
    """

    def __init__(
        self,
        target: TargetModel,
        draft: DraftModel | None = None,
        *,
        num_slots: int = 8192,
        seed: int | None = None,
        block_verification: bool = False,
        graphs: GraphChoice = "auto",
    ) -> None:
        self.target = target
        self.graphs = graph_cache(graphs, target)
        spare = 0 if self.graphs is None else MAX_TOKENS
        self.cache: KVCache = target.new_cache(num_slots + spare)
        self.block_verification = block_verification
        self._device = target.device
        self._generator = torch.Generator(self._device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self.proposer: Proposer | None = None
        self._taps = None if draft is None else draft.config.tap_layers
        if draft is not None:
            check_draft_fits(draft, target)
            self.proposer = Proposer(draft, num_slots, self._generator, self.graphs)
        self.target_passes: TargetPasses | None = None
        if self.graphs is not None:
            scratch = self.cache.withhold(spare)
            self.target_passes = TargetPasses(self.cache, scratch, self.graphs, taps=self._taps)

    @staticmethod
    def bytes_per_slot(target: TargetModel, draft: DraftModel | None) -> int:
        """Cache memory of one token, target and draft together, in bytes."""
        config = target.config
        size = KVCache.bytes_per_slot(config.num_layers, config.num_kv_heads, config.head_dim, target.dtype)
        if draft is not None:
            own = draft.config
            size += KVCache.bytes_per_slot(1, own.num_kv_heads, own.head_dim, target.dtype)
        return size

    @torch.inference_mode()
    def warm_up(
        self, shapes: Sequence[tuple[int, Speculation]], num_keys: Sequence[int] = WARM_UP_KEYS
    ) -> int:
        """Records the passes of plain and drafting rounds, so that the first requests need not.

        Nothing happens where passes are not recorded. Others than these are recorded when they have come up often
        enough, and so are those of fine-tunes and private modules.

        Args:
            shapes: numbers of sequences, and how they draft; greedily, with the base model and the shared draft.
            num_keys: lengths of the longest sequence.

        Returns:
            How many recordings there are.
        """
        if self.graphs is None or self.target_passes is None:
            return 0
        fine_tune = FineTune("base", self.target)
        for keys in num_keys:
            for num_rows, speculation in shapes:
                self.target_passes.prepare(self.target, None, num_rows, 1, keys)
                if self.proposer is not None and self.proposer.passes is not None:
                    self.target_passes.prepare(self.target, None, num_rows, speculation.num_nodes + 1, keys)
                    self.proposer.passes.prepare(fine_tune, num_rows, speculation, keys)
        return len(self.graphs)

    # admission

    def _capacity(self, state: SequenceState) -> int:
        return state.max_length + (state.speculation.slots if self._can_draft(state) else 0)

    def _can_draft(self, state: SequenceState) -> bool:
        return state.drafts and self.proposer is not None

    def fits(self, state: SequenceState) -> bool:
        """Whether the sequence would fit into an empty cache."""
        return self._capacity(state) <= self.cache.num_slots

    def can_admit(self, state: SequenceState) -> bool:
        """Whether ``admit`` would succeed now."""
        return self.cache.allocator.can_allocate(self._capacity(state))

    def admit(self, state: SequenceState) -> None:
        """Reserves cache slots for the sequence's whole life. Raises ``CacheFullError``."""
        state.extent = self.cache.allocator.allocate(self._capacity(state))
        state.drafts = self._can_draft(state)
        if state.sampling.needs_history:
            state.history = TokenHistory(state.token_ids, self.target.config.vocab_size, self._device)

    def release(self, state: SequenceState) -> None:
        """Gives the sequence's slots back; nothing happens when it has none."""
        if state.extent is not None:
            self.cache.allocator.release(state.extent)
            state.extent = None

    # the step

    @torch.inference_mode()
    def step(self, scheduled: Sequence[ScheduledRow]) -> list[StepResult]:
        """Propose, verify and accept for every row; results in the order of ``scheduled``.

        Raises ``ValueError`` for a row that was not admitted or schedules more tokens than it has.
        """
        rows = [
            StepRow(index, row.state, row.num_tokens, emits=row.num_tokens == row.state.num_uncomputed)
            for index, row in enumerate(scheduled)
        ]
        for row in rows:
            if row.state.extent is None or not 1 <= row.num_tokens <= row.state.num_uncomputed:
                raise ValueError(
                    f"row {row.index} schedules {row.num_tokens} tokens; it is admitted: "
                    f"{row.state.extent is not None}, and has {row.state.num_uncomputed} to compute"
                )
        with kernel_threads_only() if self.target.has_kernel else nullcontext():
            self._propose(rows)
            return self._accept(rows, *self._verify_pass(rows))

    # propose

    def _propose(self, rows: list[StepRow]) -> None:
        if self.proposer is None:
            return
        lengths = [self._draft_length(row) for row in rows]
        extending = [
            index
            for index, row in enumerate(rows)
            if row.state.num_pending_features
            and (lengths[index] or row.state.is_prefilling or row.state.pending_bytes >= MAX_PENDING_BYTES)
        ]
        if not extending:
            return
        extending = [extending[index] for index in in_draft_order([rows[index].state for index in extending])]
        chain_lengths = [lengths[index] for index in extending]
        trees = any(lengths[index] and rows[index].state.speculation.mode == "tree" for index in extending)
        hidden, chains = self.proposer.extend(
            [rows[index].state for index in extending], None if trees else chain_lengths
        )
        if chains is not None:
            for index, chain in zip(extending, chains, strict=True):
                rows[index].proposal = chain if chain.token_ids else None
            return
        by_shape: dict[tuple[int, int, int] | None, list[int]] = {}
        for place, index in enumerate(extending):
            if lengths[index]:
                shape = rows[index].state.speculation
                key = (
                    (shape.tree_top_k, lengths[index], shape.tree_num_nodes) if shape.mode == "tree" else None
                )
                by_shape.setdefault(key, []).append(place)
        for key, places in by_shape.items():
            chosen = [rows[extending[place]] for place in places]
            states = [row.state for row in chosen]
            inputs = hidden if len(places) == len(extending) else hidden[upload(places, self._device)]
            if key is None:
                proposals = self.proposer.propose_chains(
                    states, inputs, [lengths[row.index] for row in chosen]
                )
            else:
                top_k, depth, num_nodes = key
                proposals = self.proposer.propose_trees(
                    states, inputs, top_k=top_k, depth=depth, num_nodes=num_nodes
                )
            for row, proposal in zip(chosen, proposals, strict=True):
                row.proposal = proposal if proposal.token_ids else None

    def _draft_length(self, row: StepRow) -> int:
        """Draft tokens (chain) or levels (tree) that make sense for this row now."""
        state = row.state
        if not state.drafts or state.is_prefilling or state.speculation.mode == "none":
            return 0
        # The verifying pass always emits one token itself, so the last position needs no draft.
        room = state.max_length - len(state.token_ids) - 1
        length = min(state.speculation.num_speculative_tokens, room)
        # A speculation set after admission may ask for more slots than were reserved.
        extent = state.extent
        if extent is not None and len(state.token_ids) + state.speculation.slots > extent.capacity:
            length = (
                min(length, extent.capacity - len(state.token_ids) - 1)
                if state.speculation.mode == "chain"
                else 0
            )
        return max(0, length)

    # verify

    def _verify_pass(self, rows: list[StepRow]) -> tuple[Tensor | None, list[int] | None]:
        """One target pass per set of full weights, for all nodes of all emitting rows, in row order.

        Returns their logits; or only the likeliest tokens, where no row needs more and the target can tell them.
        """
        # Rows of one LoRA stand together, so that each adapter is one segment of the pack.
        by_model: dict[int, list[StepRow]] = {}
        for row in rows:
            by_model.setdefault(id(row.state.fine_tune.model), []).append(row)
        only_best = all(_needs_only_best(row.state) for row in rows if row.emits)
        parts: dict[int, Tensor] = {}
        best: dict[int, list[int]] = {}
        for group in by_model.values():
            group.sort(key=lambda row: id(row.state.fine_tune.lora))
            self._target_pass(group, parts, best, only_best=only_best)
        emitting = [row.index for row in rows if row.emits]
        if not emitting:
            return torch.empty(0, self.target.config.vocab_size, device=self._device), None
        if only_best:
            return None, [token for index in emitting for token in best[index]]
        ordered = [parts[index] for index in emitting]
        return ordered[0] if len(ordered) == 1 else torch.cat(ordered), None

    def _target_pass(
        self, group: list[StepRow], parts: dict[int, Tensor], best: dict[int, list[int]], *, only_best: bool
    ) -> None:
        place_rows(group)
        output = self._replayed_pass(group) or self._eager_pass(group, only_best=only_best)
        offset = 0
        for row in group:
            if row.emits:
                lines = slice(offset, offset + row.num_queries - row.num_tokens + 1)
                offset = lines.stop
                if output.logits is not None:
                    parts[row.index] = output.logits[lines]
                if output.best is not None:
                    best[row.index] = output.best[lines]
            if row.state.drafts and output.features is not None:
                row.state.keep_features(output.features[row.start : row.start + row.num_queries])

    def _eager_pass(self, group: list[StepRow], *, only_best: bool) -> TargetOutput:
        model = group[0].state.fine_tune.model
        tokens, batch = pack(group, self._device)
        wanted = [
            index
            for row in group
            if row.emits
            for index in range(row.start + row.num_tokens - 1, row.start + row.num_queries)
        ]
        output: TargetOutput = model(
            tokens,
            batch,
            self.cache,
            lora_segments(group),
            taps=self._taps if any(row.state.drafts for row in group) else None,
            wanted=wanted,
            only_best=only_best,
        )
        return output

    def _replayed_pass(self, group: list[StepRow]) -> TargetOutput | None:
        """The same from a recording, where there is one for rows like these."""
        fine_tune = group[0].state.fine_tune
        if self.target_passes is None or any(row.state.fine_tune.lora is not fine_tune.lora for row in group):
            return None
        if not self.target_passes.takes(len(group), max(row.num_queries for row in group)):
            return None
        return self.target_passes.run(fine_tune.model, fine_tune.lora, [row.targets() for row in group])

    # accept

    def _accept(self, rows: list[StepRow], logits: Tensor | None, best: list[int] | None) -> list[StepResult]:
        emitting = [row for row in rows if row.emits]
        verdicts = verify(
            logits,
            [
                VerificationRow(
                    row.state.sampling,
                    row.proposal,
                    row.state.history,
                    row.state.num_generated,
                    len(row.state.token_ids),
                )
                for row in emitting
            ],
            self._generator,
            block=self.block_verification,
            best=best,
            in_kernel=self.target.has_kernel,
        )
        results = [StepResult([]) for _ in rows]
        source: list[int] = []
        destination: list[int] = []
        for row, verdict in zip(emitting, verdicts, strict=True):
            state, extent = row.state, row.state.extent
            if extent is None:
                raise RuntimeError("a sequence was released in the middle of a step")
            accepted = verdict.accepted_nodes
            if row.proposal is not None and state.drafts:
                state.cut_features(row.num_tokens, accepted)
            first = extent.start + extent.length + row.num_tokens - 1
            for place, node in enumerate(accepted, start=1):
                if node != place:
                    source.append(first + node)
                    destination.append(first + place)
            extent.length += row.num_tokens + len(accepted)
            state.token_ids.extend(verdict.token_ids)
            if state.history is not None:
                state.history.append(verdict.token_ids)
            results[row.index] = StepResult(
                verdict.token_ids,
                verdict.logprobs,
                len(row.proposal.token_ids) if row.proposal else 0,
                len(accepted),
            )
        for row in rows:
            if not row.emits and row.state.extent is not None:
                row.state.extent.length += row.num_tokens
        if source:
            self.cache.move(*upload([source, destination], self._device))
        return results


def check_draft_fits(draft: DraftModel, target: TargetModel) -> None:
    """Raises ``MismatchError`` when the draft was made for another target, by sizes or by fingerprint."""
    for name in ("hidden_size", "vocab_size"):
        theirs, ours = getattr(target.config, name), getattr(draft.config, name)
        if theirs != ours:
            raise MismatchError(f"the draft was made for {name} {ours}; the target has {theirs}")
    if max(draft.config.tap_layers) >= target.config.num_layers:
        raise MismatchError(
            f"the draft taps layers {draft.config.tap_layers}; the target has {target.config.num_layers} layers"
        )
    recorded = draft.config.target_fingerprint
    if recorded and recorded != target.fingerprint:
        raise MismatchError(
            f"the draft was trained for the target {recorded[:16]}...; this target is {target.fingerprint[:16]}..."
        )


def _needs_only_best(state: SequenceState) -> bool:
    """Whether verifying takes no more than the target's likeliest tokens, and the target can tell them."""
    return state.sampling.demand == SamplingDemand.NOTHING and state.fine_tune.tells_likeliest
