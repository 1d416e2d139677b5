"""The speculative step: propose -> run the target -> verify -> accept, for a batch of sequences.

One ``SpeculativeDecoder.step`` runs the draft for every row that speculates, one target pass over all rows (prompt
chunks included), and accepts what the target agrees with. Plain decoding is the same step without a proposal. The
output is the target's own, whatever the draft: see ``eda/speculation/verification.py`` for the rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from eda.backends.base import Backend, Drafter, DraftRequest, PassPlan
from eda.backends.choice import GraphChoice, choose_backend
from eda.errors import NonFiniteLogitsError
from eda.models.answers import Need
from eda.models.cache import KVCache
from eda.models.draft import DraftModel, check_draft_fits
from eda.models.target import TargetModel
from eda.sampling.params import SamplingDemand
from eda.sampling.processors import TokenHistory
from eda.speculation.kinds import Speculation
from eda.speculation.rows import StepRow
from eda.speculation.sequence import SequenceState
from eda.speculation.verification import AnswerLines, TokenLogprobs, Verdict, VerificationRow
from eda.transfers import upload


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
    failure: NonFiniteLogitsError | None = None
    """Why the sequence cannot go on; there are no tokens then, and the caller releases it."""


class SpeculativeDecoder:
    """Decodes batches of sequences of one target family.

    Args:
        target: the base model; fine-tunes with weights of their own must have its shapes.
        backend: what computes. ``for_models`` chooses it.
    """

    def __init__(self, target: TargetModel, backend: Backend) -> None:
        self.target = target
        self.backend = backend

    @classmethod
    def for_models(
        cls,
        target: TargetModel,
        draft: DraftModel | None = None,
        *,
        num_slots: int = 8192,
        seed: int | None = None,
        block_verification: bool = False,
        graphs: GraphChoice = "auto",
    ) -> Self:
        """A decoder on the fastest backend that takes these models here.

        Args:
            draft: the shared draft, or ``None`` for plain decoding only.
            num_slots: size of the key/value cache in tokens.
            seed: of the generator that unseeded sampling uses; ``None`` takes a fresh one.
            block_verification: accept sampled chains as blocks (Sun et al. 2024).
            graphs: how small passes are recorded and replayed: "auto" (CUDA graphs on a GPU), "off", or by another
                recorder.

        Raises:
            MismatchError: the draft was made for a target of other sizes.
        """
        if draft is not None:
            check_draft_fits(draft, target)
        generator = torch.Generator(target.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        backend = choose_backend(
            target,
            draft,
            num_slots=num_slots,
            generator=generator,
            block_verification=block_verification,
            graphs=graphs,
        )
        return cls(target, backend)

    @property
    def cache(self) -> KVCache:
        """The target's."""
        return self.backend.cache

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
    def warm_up(self, shapes: Sequence[tuple[int, Speculation]]) -> int:
        """Makes ready for ``shapes``, numbers of sequences and how they draft, so that the first requests need not.

        Returns:
            How many passes are ready now.
        """
        return self.backend.prepare(shapes)

    # admission

    def _drafter(self, state: SequenceState) -> Drafter | None:
        """What drafts for the sequence now; ``None`` where nothing does."""
        drafter = self.backend.drafters.get(type(state.speculation)) if state.drafts else None
        if drafter is not None and drafter.taps is not None and not state.keeps_features:
            return None  # nobody kept what it would read
        return drafter

    def _capacity(self, state: SequenceState) -> int:
        drafts = state.drafts and type(state.speculation) in self.backend.drafters
        return state.max_length + (state.speculation.slots if drafts else 0)

    def fits(self, state: SequenceState) -> bool:
        """Whether the sequence would fit into an empty cache."""
        return self._capacity(state) <= self.cache.num_slots

    def can_admit(self, state: SequenceState) -> bool:
        """Whether ``admit`` would succeed now."""
        return self.cache.allocator.can_allocate(self._capacity(state))

    def admit(self, state: SequenceState) -> None:
        """Reserves cache slots for the sequence's whole life. Raises ``CacheFullError``."""
        state.extent = self.cache.allocator.allocate(self._capacity(state))
        drafter = self.backend.drafters.get(type(state.speculation))
        state.drafts = state.drafts and drafter is not None
        state.keeps_features = state.drafts and drafter is not None and drafter.taps is not None
        if state.sampling.needs_history:
            state.history = TokenHistory(state.token_ids, self.target.config.vocab_size, self.target.device)

    def release(self, state: SequenceState) -> None:
        """Gives the sequence's slots back; nothing happens when it has none."""
        if state.extent is not None:
            self.cache.allocator.release(state.extent)
            state.extent = None

    # the step

    @torch.inference_mode()
    def step(self, scheduled: Sequence[ScheduledRow]) -> list[StepResult]:
        """Propose, run the target, verify and accept for every row; results in the order of ``scheduled``.

        Raises ``ValueError`` for a row that was not admitted or schedules more tokens than it has.
        """
        rows = _checked_rows(scheduled)
        with self.backend.around_step():
            self._propose(rows)
            answers = self._run_target(rows)
            return self._accept(rows, self._verify(rows, answers))

    def _propose(self, rows: Sequence[StepRow]) -> None:
        """Every drafter sees every row that keeps features for it, since it may read them without drafting."""
        chosen = [self._drafter(row.state) for row in rows]
        for drafter in {id(each): each for each in self.backend.drafters.values()}.values():
            places = [
                place
                for place, row in enumerate(rows)
                if chosen[place] is drafter or (row.state.num_pending_features and drafter.taps is not None)
            ]
            if not places:
                continue
            requests = [
                DraftRequest(rows[place].state, _num_to_draft(rows[place]) if chosen[place] is drafter else 0)
                for place in places
            ]
            for place, proposal in zip(places, drafter.draft(requests), strict=True):
                rows[place].proposal = proposal or rows[place].proposal

    def _run_target(self, rows: Sequence[StepRow]) -> dict[int, AnswerLines]:
        """One target pass per set of full weights; answers by the index of each emitting row."""
        by_model: dict[int, list[StepRow]] = {}
        for row in rows:
            by_model.setdefault(id(row.state.fine_tune.model), []).append(row)
        answers: dict[int, AnswerLines] = {}
        for group in by_model.values():
            # Rows of one LoRA stand together, so that each adapter is one segment of the pack.
            group.sort(key=lambda row: id(row.state.fine_tune.lora))
            model = group[0].state.fine_tune.model
            output = self.backend.target.run(model, [row.for_target() for row in group], self._plan(group))
            token = line = 0
            for row in group:
                if row.state.reads_features and output.features is not None:
                    row.state.keep_features(output.features[token : token + row.num_queries])
                token += row.num_queries
                if row.emits and output.answer is not None:
                    answers[row.index] = AnswerLines(output.answer, line)
                    line += row.num_queries - row.num_tokens + 1
        return answers

    def _plan(self, group: Sequence[StepRow]) -> PassPlan:
        plain = all(row.state.sampling.demand == SamplingDemand.NOTHING for row in group if row.emits)
        reads = any(row.state.reads_features for row in group)
        return PassPlan(Need.LIKELIEST if plain else Need.LOGITS, self.backend.taps if reads else None)

    def _verify(self, rows: Sequence[StepRow], answers: dict[int, AnswerLines]) -> list[Verdict]:
        """Verdicts of the emitting rows."""
        emitting = [row for row in rows if row.emits]
        return self.backend.verifier.verify(
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

    def _accept(self, rows: Sequence[StepRow], verdicts: Sequence[Verdict]) -> list[StepResult]:
        """Lets tokens, caches and features of each row grow by what was accepted."""
        emitting = [row for row in rows if row.emits]
        results = [StepResult([]) for _ in rows]
        source: list[int] = []
        destination: list[int] = []
        for row, verdict in zip(emitting, verdicts, strict=True):
            state, extent = row.state, row.state.extent
            if extent is None:
                raise RuntimeError("a sequence was released in the middle of a step")
            if not verdict.is_finite:
                results[row.index] = StepResult([], failure=_not_finite(state))
                continue
            accepted = verdict.accepted_nodes
            if row.proposal is not None and state.reads_features:
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
            self.cache.move(*upload([source, destination], self.target.device))
        return results


def _not_finite(state: SequenceState) -> NonFiniteLogitsError:
    return NonFiniteLogitsError(
        f"the logits of {state.fine_tune.name!r} after {len(state.token_ids)} tokens are not finite: its weights are "
        "damaged or too large for the type that it computes in"
    )


def _checked_rows(scheduled: Sequence[ScheduledRow]) -> list[StepRow]:
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
    return rows


def _num_to_draft(row: StepRow) -> int:
    """Draft tokens (chain) or levels (tree) that make sense for this row now."""
    state = row.state
    if state.is_prefilling:
        return 0
    # The verifying pass always emits one token itself, so the last position needs no draft.
    room = state.max_length - len(state.token_ids) - 1
    # A speculation set after admission may ask for more slots than were reserved.
    free = 0 if state.extent is None else state.extent.capacity - len(state.token_ids)
    return state.speculation.fitting(room, free)
