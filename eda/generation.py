"""Decoding whole batches of prompts without a server: for training data, measurements and the command line."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Speculation
from eda.speculation.sequence import SequenceState
from eda.speculation.verification import TokenLogprobs

PREFILL_TOKENS_PER_STEP = 512


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to complete. Generation ends at an id in ``eos_ids`` or after ``max_tokens``.

    ``fine_tune``: the model that completes it; ``None`` is the one that ``generate`` is called with.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    speculation: Speculation = field(default_factory=Chain)
    private: PrivateModule | None = None
    fine_tune: FineTune | None = None


@dataclass(slots=True)
class Generation:
    """What came of a request.

    ``steps`` holds the draft tokens proposed and accepted in each target pass that decoded (the pass that ends the
    prompt is not one of them). Passes in which the sequence ended count with what was accepted, not with what was
    kept, so that the acceptance length is not lowered by short outputs.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = "length"
    steps: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_target_passes(self) -> int:
        return len(self.steps)

    @property
    def mean_acceptance_length(self) -> float:
        """Mean number of tokens per decoding pass of the target, the bonus token included; 1 without a draft."""
        if not self.steps:
            return 1.0
        return 1.0 + sum(accepted for _, accepted in self.steps) / len(self.steps)


@dataclass(slots=True)
class _Running:
    place: int
    request: GenerationRequest
    state: SequenceState


def generate(
    decoder: SpeculativeDecoder,
    fine_tune: FineTune,
    requests: Sequence[GenerationRequest],
    *,
    max_batch: int = 16,
    prefill_chunk: int = PREFILL_TOKENS_PER_STEP,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_finished: Callable[[int, Generation], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Generation]:
    """Completes all requests, at most ``max_batch`` at a time; results in the order of ``requests``.

    Args:
        fine_tune: the model of requests that name none.
        prefill_chunk: prompt tokens of one sequence in a step, at most.
        on_tokens: called with a request's place and its new tokens after each step that emitted some.
        on_finished: called with a request's place and result as soon as it is complete.
        should_stop: asked after each step; when true, what is running is released and the unfinished results are
            returned as they are.

    Raises:
        CacheFullError: a request does not fit into the decoder's cache even when it is alone.
    """
    results = [Generation() for _ in requests]
    waiting = deque(_running(fine_tune, place, request) for place, request in enumerate(requests))
    running: list[_Running] = []
    try:
        while (waiting or running) and not should_stop():
            while (
                waiting and len(running) < max_batch and (decoder.can_admit(waiting[0].state) or not running)
            ):
                decoder.admit(waiting[0].state)
                running.append(waiting.popleft())
            finished = _step(decoder, running, results, prefill_chunk, on_tokens)
            for sequence in finished:
                decoder.release(sequence.state)
                running.remove(sequence)
                if on_finished is not None:
                    on_finished(sequence.place, results[sequence.place])
    finally:
        for sequence in running:
            decoder.release(sequence.state)
    return results


def _running(fine_tune: FineTune, place: int, request: GenerationRequest) -> _Running:
    prompt = list(request.prompt_ids)
    state = SequenceState(
        token_ids=prompt,
        max_length=len(prompt) + request.max_tokens,
        fine_tune=request.fine_tune or fine_tune,
        sampling=request.sampling,
        private=request.private,
        speculation=request.speculation,
    )
    return _Running(place, request, state)


def _step(
    decoder: SpeculativeDecoder,
    running: Iterable[_Running],
    results: list[Generation],
    prefill_chunk: int,
    on_tokens: Callable[[int, list[int]], None] | None,
) -> list[_Running]:
    """Runs one step over ``running`` and returns the sequences that it completed."""
    budget = PREFILL_TOKENS_PER_STEP
    scheduled: list[tuple[_Running, ScheduledRow, bool]] = []
    for sequence in running:
        state = sequence.state
        if not state.is_prefilling:
            scheduled.append((sequence, ScheduledRow(state), True))
        elif budget > 0:
            count = min(state.num_uncomputed, budget, prefill_chunk)
            budget -= count
            scheduled.append((sequence, ScheduledRow(state, count), False))
    finished: list[_Running] = []
    step_results = decoder.step([row for _, row, _ in scheduled])
    for (sequence, _, decoded), result in zip(scheduled, step_results, strict=True):
        generation, request = results[sequence.place], sequence.request
        if result.failure is not None:
            raise result.failure
        if decoded:
            generation.steps.append((result.num_draft_tokens, result.num_accepted))
        count = 0
        for token in result.token_ids:
            count += 1
            generation.token_ids.append(token)
            if token in request.eos_ids:
                generation.finish_reason = "stop"
                break
            if len(generation.token_ids) == request.max_tokens:
                break
        if result.logprobs is not None:
            generation.logprobs.extend(result.logprobs[:count])
        if count and on_tokens is not None:
            on_tokens(sequence.place, result.token_ids[:count])
        if generation.finish_reason == "stop" or len(generation.token_ids) >= request.max_tokens:
            finished.append(sequence)
    return finished


@dataclass(frozen=True, slots=True)
class Throughput:
    """A measured run: output tokens over wall seconds, and how the draft did."""

    num_tokens: int
    seconds: float
    mean_acceptance_length: float
    accepted_per_position: list[float]
    """Share of decoding passes that accepted the draft token at position ``i`` (0 is the first)."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0


def measure(
    decoder: SpeculativeDecoder,
    fine_tune: FineTune,
    requests: Sequence[GenerationRequest],
    *,
    max_batch: int = 1,
) -> tuple[list[Generation], Throughput]:
    """Generates all requests and times it; the acceptance length is a mean over all passes, not over requests."""
    start = time.perf_counter()
    generations = generate(decoder, fine_tune, requests, max_batch=max_batch)
    seconds = time.perf_counter() - start
    return generations, summarise(generations, seconds)


def summarise(generations: Sequence[Generation], seconds: float) -> Throughput:
    """Totals over ``generations`` that took ``seconds`` together."""
    steps = [step for generation in generations for step in generation.steps]
    accepted = [count for _, count in steps]
    per_position = []
    for position in range(max(accepted, default=0)):
        per_position.append(sum(count > position for count in accepted) / len(accepted))
    return Throughput(
        num_tokens=sum(len(generation.token_ids) for generation in generations),
        seconds=seconds,
        mean_acceptance_length=1.0 + sum(accepted) / len(accepted) if accepted else 1.0,
        accepted_per_position=per_position,
    )
