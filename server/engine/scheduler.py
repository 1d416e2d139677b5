"""Which sequences run, and how many tokens of each go into the next step."""

from bisect import insort
from dataclasses import dataclass
from typing import Protocol

from eda.decoder import ScheduledRow, StepResult
from eda.server.engine.sequence import Sequence, SequenceStatus
from eda.server.engine.speculation import SpeculationPolicy
from eda.server.engine.stopping import FinishReason
from eda.speculation.sequence import SequenceState


class Decoder(Protocol):
    """The part of ``eda.decoder.SpeculativeDecoder`` that the engine uses."""

    def can_admit(self, state: SequenceState) -> bool: ...
    def fits(self, state: SequenceState) -> bool: ...
    def admit(self, state: SequenceState) -> None: ...
    def release(self, state: SequenceState) -> None: ...
    def step(self, rows: list[ScheduledRow]) -> list[StepResult]: ...


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """
    Attributes:
        max_running: sequences in one batch.
        max_tokens_per_step: tokens in one target pass, draft tokens included. Decoding sequences come first; what is
            left goes to prompts.
        min_prefill_tokens: prompt tokens that a step takes even when decoding uses up the budget, so that a full batch
            cannot keep a prompt waiting for ever.
    """

    max_running: int = 64
    max_tokens_per_step: int = 512
    min_prefill_tokens: int = 32


class Scheduler:
    """Continuous batching: sequences join and leave between any two steps.

    Sequences wait in the order of (priority, start tag, arrival) and are admitted from the front only: one that does
    not fit is not overtaken by others of its client, so a long prompt cannot starve.

    Start tags share the cache out between clients. Each client's sequences are laid end to end, as long as the cache
    slots that they reserve, and a client that comes anew begins where admission is: start-time fair queueing (Goyal,
    Vin and Cheng, 1996). So a client with one sequence waits for about one of each other client, however many those
    have sent.
    """

    def __init__(self, decoder: Decoder, limits: SchedulerLimits, policy: SpeculationPolicy) -> None:
        self._decoder = decoder
        self._limits = limits
        self._policy = policy
        self._arrivals = 0
        self._waiting: list[tuple[int, int, int, Sequence]] = []
        self._admitted_tag = 0
        self._next_tags: dict[str, int] = {}
        self.running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self.running)

    @property
    def sequences(self) -> list[Sequence]:
        """Everything that is waiting or running."""
        return [*self.running, *(entry[-1] for entry in self._waiting)]

    @property
    def blocked(self) -> tuple[Sequence, str] | None:
        """The sequence at the front of the queue and what it waits for; for after ``admit``."""
        if not self._waiting:
            return None
        first = self._waiting[0][-1]
        if len(self.running) >= self._limits.max_running:
            return first, f"one of the {self._limits.max_running} places in the batch (max_running)"
        output = first.state.max_length - first.num_prompt_tokens
        return first, f"cache for {first.num_prompt_tokens} prompt tokens and up to {output} output tokens"

    def add(self, sequence: Sequence) -> None:
        if not self._waiting:
            self._next_tags.clear()  # who was admitted while nobody waited took nothing from anybody
        self._arrivals += 1
        tag = max(self._admitted_tag, self._next_tags.get(sequence.client, 0))
        self._next_tags[sequence.client] = tag + sequence.state.max_length
        entry = (sequence.priority, tag, self._arrivals, sequence)
        insort(self._waiting, entry, key=lambda entry: entry[:3])

    def given_up(self, now: float) -> list[tuple[Sequence, FinishReason]]:
        """Sequences that must end before the next step: nobody listens any more, or their time is up."""
        found: list[tuple[Sequence, FinishReason]] = []
        for sequence in self.sequences:
            if sequence.aborted:
                found.append((sequence, FinishReason.ABORT))
            elif sequence.deadline is not None and now >= sequence.deadline:
                found.append((sequence, FinishReason.DEADLINE))
        return found

    def admit(self, now: float) -> list[tuple[Sequence, Exception]]:
        """Moves sequences from waiting to running while there is room. Returns those that the decoder refused."""
        refused: list[tuple[Sequence, Exception]] = []
        while self._waiting and len(self.running) < self._limits.max_running:
            _, tag, _, sequence = self._waiting[0]
            try:
                if not self._decoder.can_admit(sequence.state):
                    break
                self._decoder.admit(sequence.state)
            except Exception as error:
                # One sequence that cannot be set up must not stop the others behind it.
                refused.append((sequence, error))
                del self._waiting[0]
                continue
            del self._waiting[0]
            self._admitted_tag = max(self._admitted_tag, tag)
            sequence.status = SequenceStatus.RUNNING
            sequence.timing.admitted = now
            self.running.append(sequence)
        return refused

    def schedule(self) -> list[tuple[Sequence, ScheduledRow]]:
        """Rows of the next step: every decoding sequence, then prompt chunks in order of admission."""
        decoding = [sequence for sequence in self.running if not sequence.state.is_prefilling]
        self._policy.observe_batch(len(decoding))
        rows: list[tuple[Sequence, ScheduledRow]] = []
        num_tokens = 0
        for sequence in decoding:
            state = sequence.state
            state.speculation = self._policy.choose(
                sequence.labels, state.speculation, sampled=not state.sampling.is_greedy
            )
            rows.append((sequence, ScheduledRow(state, state.num_uncomputed)))
            num_tokens += state.num_uncomputed + _num_draft_tokens(state)
        budget = max(self._limits.max_tokens_per_step - num_tokens, self._limits.min_prefill_tokens)
        for sequence in self.running:
            if budget <= 0:
                break
            if sequence.state.is_prefilling:
                chunk = min(sequence.state.num_uncomputed, budget)
                rows.append((sequence, ScheduledRow(sequence.state, chunk)))
                budget -= chunk
        return rows

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, waiting or running, and gives its cache slots back."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._decoder.release(sequence.state)
        elif sequence.status is SequenceStatus.WAITING:
            self._waiting = [entry for entry in self._waiting if entry[-1] is not sequence]
        sequence.status = SequenceStatus.FINISHED


def _num_draft_tokens(state: SequenceState) -> int:
    """Tokens that verifying a full draft of this sequence adds to a pass."""
    return state.speculation.num_nodes if state.drafts else 0
