"""From what the engine gives to what clients read: choices, log-probabilities, usage and metrics."""

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from eda.formats.tokenizer import TextTokenizer
from eda.server.engine.sequence import SequenceDelta
from eda.server.engine.stopping import FinishReason
from eda.server.preparation import PreparedRequest
from eda.server.schemas.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    FinishReasonName,
    RequestMetrics,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from eda.speculation.verification import TokenLogprobs

LOWEST_LOGPROB = -9999.0
"""Written for a probability of zero: JSON has no infinity."""


@dataclass(slots=True)
class Collected:
    """The output of one sequence so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text_lengths: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, delta: SequenceDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.text_lengths += delta.text_lengths
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


def finish_reason_name(reason: FinishReason | None) -> FinishReasonName | None:
    """The two reasons that a client can see; the others end in an error."""
    if reason is None:
        return None
    return "stop" if reason is FinishReason.STOP else "length"


def completion_logprobs(
    tokenizer: TextTokenizer,
    logprobs: SequenceOf[TokenLogprobs],
    text_lengths: SequenceOf[int],
    *,
    offset: int = 0,
) -> CompletionLogprobs:
    """OpenAI's four parallel lists; ``offset`` is where the first token's text begins in the whole text."""
    offsets: list[int] = []
    for length in text_lengths:
        offsets.append(offset)
        offset += length
    tops: list[dict[str, float]] = []
    for entry in logprobs:
        top: dict[str, float] = {}
        for token_id, value in entry.top:
            # Two tokens may have the same text; the likelier one, which comes first, stays.
            top.setdefault(tokenizer.token_text(token_id), _finite(value))
        top.setdefault(tokenizer.token_text(entry.token_id), _finite(entry.logprob))
        tops.append(top)
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(entry.token_id) for entry in logprobs],
        token_logprobs=[_finite(entry.logprob) for entry in logprobs],
        top_logprobs=tops,
        text_offset=offsets,
    )


def chat_logprobs(tokenizer: TextTokenizer, logprobs: Iterable[TokenLogprobs]) -> ChatLogprobs:
    """One entry for each token, with its bytes and the likeliest tokens at its place."""
    content: list[TokenLogprob] = []
    for entry in logprobs:
        own = _top_logprob(tokenizer, entry.token_id, entry.logprob)
        top = [_top_logprob(tokenizer, token_id, value) for token_id, value in entry.top]
        content.append(TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


def _top_logprob(tokenizer: TextTokenizer, token_id: int, value: float) -> TopLogprob:
    return TopLogprob(
        token=tokenizer.token_text(token_id),
        logprob=_finite(value),
        bytes=list(tokenizer.token_bytes(token_id)),
    )


def _finite(value: float) -> float:
    """Raises ``ValueError`` for NaN, which is no probability: such a sequence fails before it comes here."""
    if math.isnan(value):
        raise ValueError("a log-probability is NaN")
    return max(value, LOWEST_LOGPROB)


def usage_of(request: PreparedRequest) -> Usage:
    prompt, completion = request.num_prompt_tokens, request.num_completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def metrics_of(request: PreparedRequest) -> RequestMetrics:
    """Over all sequences of a finished request together."""
    counts = [sequence.counts for sequence in request.sequences]
    timings = [sequence.timing for sequence in request.sequences]
    num_passes = sum(count.num_target_passes for count in counts)
    num_drafted = sum(count.num_draft_tokens for count in counts)
    first_tokens = [
        timing.first_token - timing.submitted for timing in timings if timing.first_token is not None
    ]
    admitted = min((timing.admitted for timing in timings if timing.admitted is not None), default=None)
    last = max((timing.last_token for timing in timings if timing.last_token is not None), default=None)
    seconds = last - admitted if last is not None and admitted is not None else 0.0
    rate = request.num_completion_tokens / seconds if seconds > 0 else 0.0
    return RequestMetrics(
        tokens_per_second=round(rate, 2),
        time_to_first_token_ms=round(1000 * min(first_tokens), 2) if first_tokens else None,
        mean_acceptance_length=round(sum(c.num_emitted for c in counts) / num_passes, 4)
        if num_passes
        else 1.0,
        draft_acceptance_rate=round(sum(c.num_accepted for c in counts) / num_drafted, 4)
        if num_drafted
        else None,
        num_target_passes=num_passes,
        draft=request.sequences[0].labels.draft,
        adapter=request.sequences[0].labels.adapter,
        adapter_version=request.sequences[0].labels.adapter_version,
    )
