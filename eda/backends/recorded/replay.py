"""Recording a function that works on fixed buffers, and running the recording again.

On a GPU a recording is a CUDA graph: hundreds of operations for one launch. The other backend calls the function
itself again, which says the same on any device and saves nothing; it is there for tests.
"""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

MAX_GRAPHS = 128
"""Recordings that are kept; the longest unused is dropped first."""
CAPTURE_AFTER = 4
"""A recording costs about as much as this many passes, so a shape has to come up so often before it is made."""
MAX_FAILURES = 3
"""After so many recordings in a row that failed, no more are tried."""
_MAX_COUNTED = 1024
_WARM_UPS = 3

Replay = Callable[[], object]
Recordable = tuple[Callable[[], None], Sequence[Tensor]]
"""A function over buffers, and the buffers that hold its results."""


class Recorder(Protocol):
    """Makes recordings."""

    def capture(self, function: Callable[[], None], outputs: Sequence[Tensor]) -> Replay:
        """Runs ``function`` and records it. It reads and writes buffers that outlive the recording, and no others.

        Args:
            outputs: the buffers that hold its result.

        Returns:
            A call that does to the buffers what ``function`` would.

        Raises:
            RuntimeError: it cannot be recorded, or the recording does something else.
        """
        ...


class RerunBackend:
    """Calls the function again, on any device."""

    def capture(self, function: Callable[[], None], outputs: Sequence[Tensor]) -> Replay:
        function()
        return function


class CudaGraphBackend:
    """Records CUDA graphs; all share one pool of memory, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def capture(self, function: Callable[[], None], outputs: Sequence[Tensor]) -> Replay:
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream(self._device)
            assert self._stream is not None
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):  # libraries choose and allocate in their first calls
                    function()
                expected = [output.clone() for output in outputs]
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may load models meanwhile: only this thread's calls are held to a capture's rules.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                function()
            graph.replay()
            _check_same(outputs, expected)
        return graph.replay


def _check_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raises ``RuntimeError`` when a replay's results are not those of the function itself."""
    for place, (output, wanted) in enumerate(zip(found, expected, strict=True)):
        ours, theirs = output.double(), wanted.double()
        bound = 0.02 * float(theirs.nan_to_num(0.0, 0.0, 0.0).abs().max()) if theirs.numel() else 0.0
        if not torch.allclose(ours, theirs, rtol=0.0, atol=bound, equal_nan=True):
            raise RuntimeError(f"a replay gave other values than the function itself in output {place}")


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a recording is for. ``owners`` are held weakly: with any of them, its recordings go."""

    kind: str
    shape: tuple[Hashable, ...]
    owners: tuple[weakref.ref[Any], ...]


@dataclass(slots=True)
class GraphStats:
    """Counts since the start."""

    captured: int = 0
    replayed: int = 0
    declined: int = 0
    """Passes that ran without a recording: the shape was new, or recording it had failed."""
    failed: int = 0
    dropped: int = 0
    """Recordings given up for newer ones or with their weights."""


@dataclass(slots=True, eq=False)
class GraphCache:
    """A bounded number of recordings, made when a shape has come up often enough.

    Attributes:
        backend: makes the recordings.
        max_graphs: recordings kept; the longest unused goes first.
        capture_after: how often a key is asked for before it is recorded.
    """

    backend: Recorder
    max_graphs: int = MAX_GRAPHS
    capture_after: int = CAPTURE_AFTER
    stats: GraphStats = field(default_factory=GraphStats)
    # The function stays beside its recording: it holds the buffers that the recording works on.
    _graphs: OrderedDict[GraphKey, tuple[Replay, Callable[[], None]]] = field(default_factory=OrderedDict)
    _seen: OrderedDict[GraphKey, int] = field(default_factory=OrderedDict)
    _refused: OrderedDict[GraphKey, None] = field(default_factory=OrderedDict)
    _failures_in_a_row: int = 0
    _told: bool = False
    # A list, since owners may die in any thread: appending is all that happens there.
    _deaths: list[weakref.ref[Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._graphs)

    def keys(self) -> list[GraphKey]:
        """What there are recordings for, the longest unused first."""
        return list(self._graphs)

    @property
    def is_off(self) -> bool:
        """Whether recordings failed so often that no more are made."""
        return self._failures_in_a_row >= MAX_FAILURES

    def key(self, kind: str, shape: tuple[Hashable, ...], owners: Sequence[object]) -> GraphKey:
        """A key for ``get``. ``owners``: whatever holds weights that the function reads; ``None`` is left out."""
        references = tuple(weakref.ref(owner, self._deaths.append) for owner in owners if owner is not None)
        present = tuple(owner is not None for owner in owners)
        return GraphKey(kind, (*shape, present), references)

    def lacks(self, key: GraphKey) -> bool:
        """Whether there is no recording yet, and one could be made."""
        return not (self.is_off or key in self._graphs or key in self._refused)

    def wants(self, key: GraphKey) -> bool:
        """Whether ``run`` is to be called for ``key``: it is recorded, or has been asked for often enough."""
        self._forget_dead()
        if key in self._graphs:
            return True
        if self.is_off or key in self._refused:
            self.stats.declined += 1
            return False
        count = self._seen.pop(key, 0) + 1
        if count >= self.capture_after:
            return True
        self._seen[key] = count
        if len(self._seen) > _MAX_COUNTED:
            self._seen.popitem(last=False)
        self.stats.declined += 1
        return False

    def run(self, key: GraphKey, make: Callable[[], Recordable]) -> bool:
        """Replays the recording of ``key``, or makes it with ``make() -> (function, outputs)``.

        The buffers must hold the pass's inputs. Returns whether the outputs hold its results now; if not, recording
        failed, and the caller has to compute them in another way.
        """
        known = self._graphs.get(key)
        if known is not None:
            self._graphs.move_to_end(key)
            known[0]()
            self.stats.replayed += 1
            return True
        try:
            function, outputs = make()
            self._graphs[key] = self.backend.capture(function, outputs), function
        except RuntimeError as error:
            self._refuse(key, error)
            return False
        self._failures_in_a_row = 0
        self.stats.captured += 1
        while len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
            self.stats.dropped += 1
        return True

    def _refuse(self, key: GraphKey, error: RuntimeError) -> None:
        self._refused[key] = None
        if len(self._refused) > _MAX_COUNTED:
            self._refused.popitem(last=False)
        self._failures_in_a_row += 1
        self.stats.failed += 1
        if not self._told:
            self._told = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            _logger.warning(
                "%s %s cannot run as a recorded graph, so it runs operation by operation: %s",
                key.kind,
                key.shape,
                reason,
            )

    def _forget_dead(self) -> None:
        if not self._deaths:
            return
        self._deaths.clear()
        dead = [key for key in self._graphs if any(owner() is None for owner in key.owners)]
        for key in dead:
            del self._graphs[key]
        self.stats.dropped += len(dead)
        for table in (self._seen, self._refused):
            for key in [key for key in table if any(owner() is None for owner in key.owners)]:
                table.pop(key)
