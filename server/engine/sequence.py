"""A sequence: one prompt being continued, from submission to its last token."""

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from eda.decoder import StepResult
from eda.server.engine.draft_mode import DraftMode
from eda.server.engine.stopping import FinishReason, StopChecker
from eda.speculation.sequence import SequenceState
from eda.speculation.verification import TokenLogprobs


class SequenceStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SequenceLabels:
    """What a sequence is counted under. Plain names: the engine knows nothing of registries."""

    model_name: str
    draft: DraftMode
    """What drafts, which may be less than the request asks for."""
    adapter: str | None = None
    adapter_version: int | None = None


@dataclass(frozen=True, slots=True)
class StepStats:
    """One decoding step of one sequence, as the decoder did it: not cut by stop conditions."""

    labels: SequenceLabels
    mode: Literal["none", "chain", "tree", "lookup"]
    num_draft_tokens: int
    num_accepted: int
    num_emitted: int
    sampled: bool = False
    """Whether the sequence has a temperature, with or without a seed."""


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What a step added to a sequence's output, cut at its stop.

    ``text`` may lag behind ``token_ids``: text that could become a stop string is held back.
    """

    text: str = ""
    token_ids: SequenceOf[int] = ()
    logprobs: SequenceOf[TokenLogprobs] = ()
    """One for each of ``token_ids`` when the request asks for log-probabilities, else empty."""
    text_lengths: SequenceOf[int] = ()
    """Characters that each of ``token_ids`` stands for, those held back included."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None


@dataclass(slots=True)
class SequenceTiming:
    """Monotonic seconds at which things happened; ``None`` until they do."""

    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class SequenceCounts:
    """Running totals of one sequence."""

    num_target_passes: int = 0
    """Passes that decoded. Those over the prompt, its last included, do not count: no draft comes before them."""
    num_emitted: int = 0
    """Tokens of these passes, those behind a stop included, so that short outputs do not lower the mean."""
    num_draft_tokens: int = 0
    num_accepted: int = 0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a decoding pass emitted on average, the bonus token included; 1 before the first pass."""
        return self.num_emitted / self.num_target_passes if self.num_target_passes else 1.0

    @property
    def draft_acceptance_rate(self) -> float | None:
        return self.num_accepted / self.num_draft_tokens if self.num_draft_tokens else None


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of one prompt.

    The engine's thread owns everything but ``aborted``, which any thread may set.

    Attributes:
        state: the decoder's part: tokens, cache slots, sampling, fine-tune, private module.
        checker: finds the end of the output; sees every token once.
        deadline: monotonic seconds after which the sequence is given up; ``None`` for never.
        priority: smaller ones are admitted first.
        prefers_private: the request takes a private module where there is one, so that comparing the module with the
            shared draft is fair.
        client: who asked; the queue is shared out between clients.
    """

    request_id: str
    state: SequenceState
    checker: StopChecker
    labels: SequenceLabels
    deadline: float | None = None
    priority: int = 0
    prefers_private: bool = False
    client: str = ""
    status: SequenceStatus = SequenceStatus.WAITING
    aborted: bool = False
    num_prompt_tokens: int = field(init=False)
    timing: SequenceTiming = field(default_factory=SequenceTiming)
    counts: SequenceCounts = field(default_factory=SequenceCounts)
    finish_reason: FinishReason | None = None
    failure: Exception | None = None
    """What ended it from outside of its own tokens."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.state.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that the request sees; what the decoder emitted behind a stop is not counted."""
        return self.checker.num_tokens

    def accept(self, result: StepResult, now: float) -> tuple[SequenceDelta, StepStats | None]:
        """Takes a step's tokens one by one until a stop. Returns what is new, and the step for the statistics.

        The statistics leave out passes over the prompt, its last included: nothing could be drafted before them.
        """
        if not result.token_ids:
            return SequenceDelta(), None
        stats = self._count(result, now)
        text: list[str] = []
        text_lengths: list[int] = []
        finish_reason: FinishReason | None = None
        stop_reason: int | str | None = None
        for token_id in result.token_ids:
            checked = self.checker.push(token_id)
            text.append(checked.text)
            text_lengths.append(checked.num_characters)
            if checked.finish_reason is not None:
                finish_reason, stop_reason = checked.finish_reason, checked.stop_reason
                break
        num_taken = len(text_lengths)
        if finish_reason is None and len(self.state.token_ids) >= self.state.max_length:
            # The decoder stops at the model's longest sequence, which may come before max_tokens.
            finish_reason = FinishReason.LENGTH
            text.append(self.checker.flush())
        delta = SequenceDelta(
            text="".join(text),
            token_ids=result.token_ids[:num_taken],
            logprobs=result.logprobs[:num_taken] if result.logprobs is not None else (),
            text_lengths=text_lengths,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
        return delta, stats

    def _count(self, result: StepResult, now: float) -> StepStats | None:
        counts, timing = self.counts, self.timing
        is_first = timing.first_token is None
        if is_first:
            timing.first_token = now
        timing.last_token = now
        if is_first:
            return None
        counts.num_target_passes += 1
        counts.num_emitted += len(result.token_ids)
        counts.num_draft_tokens += result.num_draft_tokens
        counts.num_accepted += result.num_accepted
        return StepStats(
            self.labels,
            self.state.speculation.mode,
            result.num_draft_tokens,
            result.num_accepted,
            len(result.token_ids),
            sampled=not self.state.sampling.is_greedy,
        )
