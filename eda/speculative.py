"""The speculative step: propose -> verify -> accept, for a batch of sequences.

One ``SpeculativeDecoder.step`` runs the draft for every row that speculates, one target pass over all rows (prompt
chunks included), and accepts what the target agrees with. Plain decoding is the same step without a proposal. The
output is the target's own, whatever the draft: see ``eda/verification.py`` for the rules.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from eda.answers import Need
from eda.backends.base import PassPlan, TargetRunner, Verifier
from eda.backends.eager.target import EagerTarget
from eda.backends.eager.verifier import RulesVerifier
from eda.draft import DraftModel
from eda.errors import MismatchError
from eda.kernels.parallel import kernel_threads_only
from eda.kernels.verification import CpuVerifier
from eda.kv_cache import KVCache
from eda.packing import StepRow
from eda.proposer import Proposer, in_draft_order
from eda.sampling import TokenHistory
from eda.sampling_params import SamplingDemand
from eda.state import SequenceState, Speculation
from eda.static.choice import GraphChoice, graph_cache
from eda.static.shapes import MAX_TOKENS, WARM_UP_KEYS
from eda.static.target_pass import RecordedTarget
from eda.target import FineTune, TargetModel
from eda.transfers import upload
from eda.verification import AnswerLines, TokenLogprobs, VerificationRow

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
        self._target: TargetRunner = EagerTarget(self.cache)
        self.target_passes: RecordedTarget | None = None
        if self.graphs is not None:
            scratch = self.cache.withhold(spare)
            self.target_passes = RecordedTarget(
                self._target, self.cache, scratch, self.graphs, taps=self._taps
            )
            self._target = self.target_passes
        self._verifier: Verifier = RulesVerifier(self._generator, block=block_verification)
        if target.has_kernel and not block_verification:
            self._verifier = CpuVerifier(self._verifier, self._generator)

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
            return self._accept(rows, self._run_target(rows))

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

    # run the target

    def _run_target(self, rows: list[StepRow]) -> dict[int, AnswerLines]:
        """One target pass per set of full weights; answers by the index of each emitting row."""
        by_model: dict[int, list[StepRow]] = {}
        for row in rows:
            by_model.setdefault(id(row.state.fine_tune.model), []).append(row)
        answers: dict[int, AnswerLines] = {}
        for group in by_model.values():
            # Rows of one LoRA stand together, so that each adapter is one segment of the pack.
            group.sort(key=lambda row: id(row.state.fine_tune.lora))
            model = group[0].state.fine_tune.model
            output = self._target.run(model, [row.for_target() for row in group], self._plan(group))
            token = line = 0
            for row in group:
                if row.state.drafts and output.features is not None:
                    row.state.keep_features(output.features[token : token + row.num_queries])
                token += row.num_queries
                if row.emits and output.answer is not None:
                    answers[row.index] = AnswerLines(output.answer, line)
                    line += row.num_queries - row.num_tokens + 1
        return answers

    def _plan(self, group: Sequence[StepRow]) -> PassPlan:
        plain = all(row.state.sampling.demand == SamplingDemand.NOTHING for row in group if row.emits)
        reads = any(row.state.drafts for row in group)
        return PassPlan(Need.LIKELIEST if plain else Need.LOGITS, self._taps if reads else None)

    # accept

    def _accept(self, rows: list[StepRow], answers: dict[int, AnswerLines]) -> list[StepResult]:
        emitting = [row for row in rows if row.emits]
        verdicts = self._verifier.verify(
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
            [answers[row.index] for row in emitting],
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
