"""The asyncio side of the engine: submit sequences, read what they give, abort by leaving."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from eda.server.engine.draft_mode import DraftMode
from eda.server.engine.engine import Engine, EngineHooks, EngineStoppedError, Output
from eda.server.engine.scheduler import Decoder, Scheduler, SchedulerLimits
from eda.server.engine.sequence import Sequence, SequenceDelta, StepStats
from eda.server.engine.speculation import SpeculationPolicy
from eda.speculation.kinds import Speculation


class OutputStream:
    """What a group of sequences gives, as it comes. Leaving the ``with`` aborts what is still running.

        with engine.open(sequences) as stream:
            async for index, delta in stream: ...

    ``index`` is the place in ``sequences``. The iteration ends when all sequences have; it raises the error of the
    first one that failed.
    """

    def __init__(self, sequences: list[Sequence], abort: Callable[["OutputStream"], None]) -> None:
        self.sequences = sequences
        self._indices = {id(sequence): index for index, sequence in enumerate(sequences)}
        self._unfinished = set(range(len(sequences)))
        self._abort = abort
        self._ready: deque[tuple[int, SequenceDelta]] = deque()
        self._wake = asyncio.Event()
        self._failure: Exception | None = None

    @property
    def unfinished(self) -> list[Sequence]:
        return [self.sequences[index] for index in sorted(self._unfinished)]

    def feed(self, sequence: Sequence, delta: SequenceDelta) -> None:
        """Called in the event loop."""
        self._ready.append((self._indices[id(sequence)], delta))
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Called in the event loop: ends the iteration with ``error`` once everything before it was read."""
        self._failure = error
        self._wake.set()

    def __aiter__(self) -> AsyncIterator[tuple[int, SequenceDelta]]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[tuple[int, SequenceDelta]]:
        while self._unfinished:
            if not self._ready:
                if self._failure is not None:
                    raise self._failure
                self._wake.clear()
                await self._wake.wait()
                continue
            index, delta = self._ready.popleft()
            if delta.finish_reason is not None:
                self._unfinished.discard(index)
            if delta.error is not None:
                raise delta.error
            yield index, delta

    def close(self) -> None:
        """Aborts what is still running. Safe to call twice."""
        self._abort(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncEngine:
    """Owns the engine's thread and carries its outputs into the event loop.

    Args:
        decoder: not to be touched by anybody else from ``start`` on.
        policy: how much to draft.
        on_step_stats, on_finish, on_death: see ``EngineHooks``; called in the engine's thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        policy: SpeculationPolicy,
        limits: SchedulerLimits | None = None,
        *,
        max_waiting: int = 256,
        on_step_stats: Callable[[list[StepStats]], None] = lambda stats: None,
        on_finish: Callable[[Sequence], None] = lambda sequence: None,
        on_death: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        hooks = EngineHooks(self._on_outputs, on_step_stats, on_finish, self._on_death)
        scheduler = Scheduler(decoder, limits or SchedulerLimits(), policy)
        self._engine = Engine(decoder, scheduler, policy, hooks, max_waiting=max_waiting)
        self._policy = policy
        self._tell_death = on_death
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[int, OutputStream] = {}

    # What the engine's thread knows. Any thread may ask.

    def fits(self, sequence: Sequence) -> bool:
        """Whether the sequence would fit into an empty cache."""
        return self._engine.fits(sequence)

    @property
    def num_running(self) -> int:
        return self._engine.num_running

    @property
    def num_waiting(self) -> int:
        return self._engine.num_waiting

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and has not failed."""
        return self._engine.is_alive

    @property
    def failure(self) -> BaseException | None:
        """What the thread died of."""
        return self._engine.failure

    @property
    def seconds_without_progress(self) -> float:
        """How long ago a step ended, or 0 when there is nothing to do."""
        return self._engine.seconds_without_progress

    def speculation_for(self, draft: DraftMode) -> Speculation:
        """What a new sequence must be admitted with, so that any level chosen later has its slots."""
        return self._policy.largest_for(draft)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    def open(self, sequences: list[Sequence]) -> OutputStream:
        """Queues all of ``sequences`` or none.

        Raises ``QueueFullError`` and ``EngineStoppedError``.
        """
        stream = OutputStream(sequences, self._close)
        # Registered first: the first output may come before submit() returns.
        for sequence in sequences:
            self._streams[id(sequence)] = stream
        try:
            self._engine.submit(sequences)
        except Exception:
            self._forget(sequences)
            raise
        return stream

    async def stop(self, drain_seconds: float, *, grace_seconds: float = 60.0) -> None:
        """Lets running sequences finish for at most ``drain_seconds``, then ends the thread.

        The thread looks at the time between steps, so it may end a step later than asked; one that has not ended
        after ``grace_seconds`` more is left behind.
        """
        self._engine.stop(drain_seconds)
        await asyncio.to_thread(self._engine.join, drain_seconds + grace_seconds)

    def give_up(self, error: BaseException) -> None:
        """Answers everybody with a failure and takes nothing more, whatever the thread is doing."""
        self._engine.stop(0.0)
        self._fail_all(error)

    def _close(self, stream: OutputStream) -> None:
        unfinished = stream.unfinished
        self._forget(stream.sequences)
        if unfinished:
            self._engine.abort(unfinished)

    def _forget(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._streams.pop(id(sequence), None)

    # -- from the engine's thread --------------------------------------------------------------------------------

    def _on_outputs(self, outputs: list[Output]) -> None:
        self._in_loop(self._deliver, outputs)

    def _on_death(self, error: BaseException) -> None:
        self._tell_death(error)
        self._in_loop(self._fail_all, error)

    def _in_loop(self, function: Callable[..., None], *arguments: object) -> None:
        # One call per step, not one per sequence: waking the loop costs more than delivering.
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    # -- in the event loop ---------------------------------------------------------------------------------------

    def _deliver(self, outputs: list[Output]) -> None:
        for sequence, delta in outputs:
            stream = self._streams.get(id(sequence))
            if stream is not None:
                stream.feed(sequence, delta)

    def _fail_all(self, error: BaseException) -> None:
        for stream in set(self._streams.values()):
            failure = EngineStoppedError("the engine has failed; the server must be restarted")
            failure.__cause__ = error
            stream.fail(failure)
