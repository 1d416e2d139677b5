"""The engine: one thread that schedules, steps the decoder and hands out what came of it.

`step()` is the whole cycle: schedule -> decode -> postprocess. Everything reaches the thread through one queue and
leaves it through callbacks; no lock is held while the decoder works.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch

from eda.decoder import ScheduledRow, StepResult
from eda.errors import NonFiniteLogitsError
from eda.server.engine.scheduler import Decoder, Scheduler
from eda.server.engine.sequence import Sequence, SequenceDelta, StepStats
from eda.server.engine.speculation import SpeculationPolicy
from eda.server.engine.stopping import FinishReason

logger = logging.getLogger(__name__)

Output = tuple[Sequence, SequenceDelta]

TELL_WAITING_AFTER = 1.0
TELL_WAITING_EVERY = 10.0
"""Seconds: when the log says what the first sequence of the queue waits for, and how often at most."""

MAX_FAILED_STEPS = 8
"""Steps in a row in which every sequence failed, of models that had worked before: then the engine is broken."""


class EngineError(Exception):
    """Root of what the engine raises."""


class QueueFullError(EngineError):
    """Too many sequences are waiting."""


class EngineStoppedError(EngineError):
    """The engine is draining, stopped or broken, and takes no more sequences."""


class DeadlineError(EngineError):
    """A sequence's time was up before it was finished."""


class ModelStepError(EngineError):
    """The model failed on one sequence; the cause is chained."""


@dataclass(frozen=True, slots=True)
class EngineHooks:
    """Called in the engine's thread; they must be quick and must not raise.

    Attributes:
        on_outputs: what one step gave, for all sequences together.
        on_step_stats: accepted lengths of one step, one entry for each decoded sequence.
        on_finish: a sequence that has just ended, for whatever reason.
        on_death: the engine broke and will not come back.
    """

    on_outputs: Callable[[list[Output]], None]
    on_step_stats: Callable[[list[StepStats]], None] = lambda stats: None
    on_finish: Callable[[Sequence], None] = lambda sequence: None
    on_death: Callable[[BaseException], None] = lambda error: None


class Engine:
    """Runs sequences on a decoder in a thread of its own.

    Args:
        decoder: used by the engine's thread alone once ``start`` was called, except for ``fits``.
        scheduler: owned by the engine.
        max_waiting: sequences that may wait for admission. When others have filled the queue, a client may still add
            its share: ``max_waiting`` over the number of clients that wait, itself included.
    """

    def __init__(
        self,
        decoder: Decoder,
        scheduler: Scheduler,
        policy: SpeculationPolicy,
        hooks: EngineHooks,
        *,
        max_waiting: int = 256,
    ) -> None:
        self._decoder = decoder
        self._scheduler = scheduler
        self._policy = policy
        self._hooks = hooks
        self._max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _waiting and _accepting
        self._waiting: Counter[str] = Counter()  # sequences by client; clients without any are left out
        self._accepting = True
        self._stop_at: float | None = None
        self._failed_steps = 0
        self._worked: set[str] = set()
        self._last_progress = time.monotonic()
        self._told_waiting = float("-inf")
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="eda-engine", daemon=True)

    # -- called from any thread ----------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """Queues all of ``sequences`` or none.

        Raises:
            QueueFullError: they would exceed the waiting queue and their client's share of it.
            EngineStoppedError: the engine is draining or broken.
        """
        with self._lock:
            if not self._accepting:
                raise EngineStoppedError("the engine takes no more requests: it is shutting down or broken")
            self._check_room(sequences)
            self._waiting.update(sequence.client for sequence in sequences)
            # Under the lock, so that an engine that is just ending cannot miss a sequence that it has accepted.
            for sequence in sequences:
                self._inbox.put(sequence)

    def _check_room(self, sequences: list[Sequence]) -> None:
        num_waiting = self._waiting.total()
        if num_waiting + len(sequences) <= self._max_waiting:
            return
        client = sequences[0].client
        share = self._max_waiting // len(self._waiting.keys() | {client})
        if self._waiting[client] + len(sequences) > share:
            raise QueueFullError(
                f"{num_waiting} sequences are waiting, {self._waiting[client]} of them yours, and {len(sequences)} "
                f"more do not fit; the limit is {self._max_waiting}, your share now {share}"
            )

    def _leave(self, sequences: Iterable[Sequence]) -> None:
        """These wait no longer."""
        with self._lock:
            self._waiting.subtract(sequence.client for sequence in sequences)
            self._waiting = +self._waiting

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Ends sequences at the next step; finished ones are left as they are."""
        for sequence in sequences:
            sequence.aborted = True
        self._inbox.put(None)

    def stop(self, drain_seconds: float) -> None:
        """Takes no more sequences, lets running ones finish for ``drain_seconds`` and aborts the rest. Returns at once;
        ``join`` waits."""
        with self._lock:
            self._accepting = False
        self._stop_at = time.monotonic() + drain_seconds
        self._inbox.put(None)

    def fits(self, sequence: Sequence) -> bool:
        """Whether the sequence could ever be admitted."""
        return self._decoder.fits(sequence.state)

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the thread to end. Returns whether it has."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    @property
    def seconds_without_progress(self) -> float:
        """How long ago a step ended, or 0 when there is nothing to do."""
        return time.monotonic() - self._last_progress if self.num_running or self.num_waiting else 0.0

    @property
    def num_waiting(self) -> int:
        with self._lock:
            return self._waiting.total()

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    # -- the engine's thread -------------------------------------------------------------------------------------

    def step(self) -> None:
        """Schedule -> decode -> postprocess."""
        now = time.monotonic()
        outputs = self._end_given_up(now) + self._admit(now)
        scheduled = self._scheduler.schedule()
        if scheduled:
            sequences = [sequence for sequence, _ in scheduled]
            results = self._decode([row for _, row in scheduled])
            outputs += self._postprocess(sequences, results)
            self._watch_failures(sequences, results)
        self._last_progress = time.monotonic()
        if outputs:
            self._hooks.on_outputs(outputs)

    def _run(self) -> None:
        try:
            while self._receive():
                self.step()
        except BaseException as error:
            # Whatever it was, nobody may be left waiting for an answer that never comes.
            self._die(error)
        else:
            self._end_all(EngineStoppedError("the server is shutting down"))

    def _receive(self) -> bool:
        """Takes in what was submitted; sleeps while there is nothing to do. False when the thread should end."""
        block = not self._scheduler.has_work and self._stop_at is None
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                break
            block = False
            if isinstance(item, Sequence):
                self._scheduler.add(item)
                self._last_progress = time.monotonic()
        if self._stop_at is None:
            return True
        return self._scheduler.has_work and time.monotonic() < self._stop_at

    def _admit(self, now: float) -> list[Output]:
        num_running = len(self._scheduler.running)
        refused = self._scheduler.admit(now)
        left = [*self._scheduler.running[num_running:], *(sequence for sequence, _ in refused)]
        if left:
            self._leave(left)
        self._tell_waiting(now)
        return [self._end(sequence, FinishReason.ERROR, error) for sequence, error in refused]

    def _tell_waiting(self, now: float) -> None:
        """Logs what the queue waits for, in one line now and then."""
        if now - self._told_waiting < TELL_WAITING_EVERY or (blocked := self._scheduler.blocked) is None:
            return
        sequence, cause = blocked
        waited = now - sequence.timing.submitted
        if waited >= TELL_WAITING_AFTER:
            self._told_waiting = now
            logger.info(
                "request %s has waited %.1f s for %s; running: %d, waiting: %d",
                sequence.request_id,
                waited,
                cause,
                self.num_running,
                self._scheduler.num_waiting,
            )

    def _end_given_up(self, now: float) -> list[Output]:
        outputs: list[Output] = []
        for sequence, reason in self._scheduler.given_up(now):
            error = None
            if reason is FinishReason.DEADLINE:
                error = DeadlineError("the request's time limit was reached before it was finished")
            outputs.append(self._end(sequence, reason, error))
        return outputs

    def _decode(self, rows: list[ScheduledRow]) -> list[StepResult | Exception]:
        """Steps all rows together and, when that fails, each alone, so that one bad row fails by itself."""
        lengths = [len(row.state.token_ids) for row in rows]
        results: list[StepResult | Exception]
        try:
            results = [result.failure or result for result in self._decoder.step(rows)]
        except Exception as error:
            if _is_fatal(error):
                raise
            results = [
                error if len(rows) == 1 else self._decode_alone(row, length, error)
                for row, length in zip(rows, lengths, strict=True)
            ]
        return results

    def _decode_alone(self, row: ScheduledRow, length: int, cause: Exception) -> StepResult | Exception:
        if len(row.state.token_ids) != length:
            return (
                cause  # the failed step had taken tokens for this row already: they cannot be told apart now
            )
        # The failed step may have left the draft's features half updated. Plain decoding needs none of them.
        row.state.drafts = False
        try:
            [result] = self._decoder.step([row])
            return result.failure or result
        except Exception as error:
            if _is_fatal(error):
                raise
            return error

    def _watch_failures(self, sequences: list[Sequence], results: list[StepResult | Exception]) -> None:
        """Raises ``EngineError`` when models that used to work do so no longer.

        A fine-tune that never worked says nothing about the engine: its requests fail, and that is all.
        """
        outcomes = [
            (sequence.labels.model_name, result) for sequence, result in zip(sequences, results, strict=True)
        ]
        working = {name for name, _ in outcomes} - {
            name for name, result in outcomes if isinstance(result, Exception)
        }
        # A model's own numbers, which some prompts may drive out of range at will, are no sign of a broken engine.
        failed = {
            name
            for name, result in outcomes
            if isinstance(result, Exception) and not isinstance(result, NonFiniteLogitsError)
        }
        if working:
            self._worked |= working
            self._failed_steps = 0
        elif failed & self._worked:
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise EngineError(f"every sequence failed in {MAX_FAILED_STEPS} steps in a row")

    def _postprocess(self, sequences: list[Sequence], results: list[StepResult | Exception]) -> list[Output]:
        now = time.monotonic()
        outputs: list[Output] = []
        all_stats: list[StepStats] = []
        for sequence, result in zip(sequences, results, strict=True):
            if isinstance(result, Exception):
                outputs.append(self._end(sequence, FinishReason.ERROR, result))
                continue
            if not result.token_ids:
                continue
            try:
                delta, stats = sequence.accept(result, now)
            except Exception as error:  # a tokenizer that cannot decode these ids
                outputs.append(self._end(sequence, FinishReason.ERROR, error))
                continue
            if stats is not None:
                all_stats.append(stats)
                self._policy.observe_step(stats)
            if delta.finish_reason is not None:
                self._finish(sequence, delta.finish_reason)
            outputs.append((sequence, delta))
        if all_stats:
            self._hooks.on_step_stats(all_stats)
        return outputs

    def _end(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> Output:
        """Ends a sequence from outside of its own tokens."""
        sequence.failure = error
        self._finish(sequence, reason)
        if reason is FinishReason.ERROR and error is not None and not isinstance(error, EngineError):
            wrapped = ModelStepError(f"the model failed on this request: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        return sequence, SequenceDelta(finish_reason=reason, error=error)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        num_waiting = self._scheduler.num_waiting
        self._scheduler.remove(sequence)
        if self._scheduler.num_waiting < num_waiting:
            self._leave([sequence])
        sequence.finish_reason = reason
        sequence.timing.finished = time.monotonic()
        self._hooks.on_finish(sequence)

    def _end_all(self, error: EngineError) -> None:
        """Answers everyone who is still waiting for something."""
        with self._lock:
            self._accepting = False
        with suppress(queue.Empty):
            while True:
                item = self._inbox.get_nowait()
                if isinstance(item, Sequence):
                    self._scheduler.add(item)
        outputs: list[Output] = []
        for sequence in self._scheduler.sequences:
            with suppress(Exception):  # a broken decoder may fail to release
                self._finish(sequence, FinishReason.ERROR)
            outputs.append((sequence, SequenceDelta(finish_reason=FinishReason.ERROR, error=error)))
        with self._lock:
            self._waiting.clear()
        if outputs:
            self._hooks.on_outputs(outputs)

    def _die(self, error: BaseException) -> None:
        self.failure = error
        stopped = EngineStoppedError("the engine has failed; the server must be restarted")
        stopped.__cause__ = error
        self._end_all(stopped)
        self._hooks.on_death(error)


def _is_fatal(error: Exception) -> bool:
    """Errors after which the device cannot be trusted with anybody's request."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)
