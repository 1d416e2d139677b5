"""Recorded traffic: prompts and the target's own answers, as token ids, for a later adaptation.

Off unless a model's ``record_traffic`` is set. Recorded answers are what regeneration would produce: the fine-tune
wrote them. A model's records are segments of JSON lines in ``<root>/<model>/``; the oldest segment goes when all of
them together would pass the limit, so the disk holds the latest traffic and never more than that.
"""

import json
import logging
import os
import queue
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from eda.adapters.store.files import MIB
from eda.adapters.store.names import check_name

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 64 * MIB
_NUM_SEGMENTS = 16
_QUEUE_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class TrafficRecord:
    """One answered request. ``finish_reason`` is "stop" or "length"; other ends are not recorded."""

    model: str
    request_id: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    temperature: float
    finish_reason: str

    def to_line(self) -> bytes:
        """The line of a sample file, as ``eda.training.data.samples`` reads it."""
        row = {
            "id": self.request_id,
            "prompt_ids": list(self.prompt_ids),
            "response_ids": list(self.response_ids),
            "temperature": self.temperature,
            "finish_reason": self.finish_reason,
        }
        return json.dumps(row, separators=(",", ":")).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class TrafficUsage:
    """What is recorded of a model."""

    num_records: int
    num_bytes: int


class TrafficRecorder:
    """Writes records in a thread of its own. ``record`` never waits: when the disk cannot keep up, records are dropped.

    ``max_bytes`` bounds what one model's records take on disk, unless ``limits`` has another bound for it.
    """

    def __init__(self, root: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.root = Path(root)
        self.max_bytes = max_bytes
        self.limits: dict[str, int] = {}
        self.num_dropped = 0
        self._queue: queue.Queue[tuple[TrafficRecord, int] | None] = queue.Queue(_QUEUE_LENGTH)
        self._num_deletions: dict[str, int] = {}
        self._counts: dict[Path, tuple[tuple[int, int], int]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="traffic-recorder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Writes what is queued and ends the thread; safe to call without ``start``."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def record(self, record: TrafficRecord) -> None:
        """Queues ``record``."""
        try:
            self._queue.put_nowait((record, self._num_deletions.get(record.model, 0)))
        except queue.Full:
            self.num_dropped += 1

    def write(self, record: TrafficRecord) -> None:
        """Writes ``record`` now, in the caller's thread."""
        line = record.to_line()
        segment_bytes = max(self.limits.get(record.model, self.max_bytes) // _NUM_SEGMENTS, 1)
        if len(line) > segment_bytes:
            self.num_dropped += 1
            return
        with self._lock:
            directory = self._directory(record.model)
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            segments = _segments(directory)
            newest = segments[-1] if segments else directory / "00000001.jsonl"
            if newest.exists() and newest.stat().st_size + len(line) > segment_bytes:
                newest = directory / f"{int(newest.stem) + 1:08d}.jsonl"
                _trim(segments, segment_bytes * (_NUM_SEGMENTS - 1))
            with newest.open("a+b") as file:
                file.write(line if _ends_whole(file) else b"\n" + line)

    def usage(self, model: str) -> TrafficUsage:
        with self._lock:
            segments = _segments(self._directory(model))
            num_bytes = sum(segment.stat().st_size for segment in segments)
            return TrafficUsage(sum(map(self._count, segments)), num_bytes)

    def copy_to(self, model: str, destination: Path) -> int:
        """Writes all whole records of ``model`` to one file, oldest first; returns how many there are."""
        count = 0
        with self._lock, destination.open("wb") as file:
            for line in _lines(_segments(self._directory(model))):
                file.write(line)
                count += 1
        return count

    def delete(self, model: str) -> None:
        """Removes all records of ``model``, those that wait to be written included."""
        with self._lock:
            self._num_deletions[model] = self._num_deletions.get(model, 0) + 1
            directory = self._directory(model)
            shutil.rmtree(directory, ignore_errors=True)
            self._counts = {path: known for path, known in self._counts.items() if path.parent != directory}

    def _count(self, segment: Path) -> int:
        """Whole records of a segment. Only the newest one grows, so the others are read once."""
        status = segment.stat()
        state = (status.st_size, status.st_mtime_ns)
        known = self._counts.get(segment)
        if known is None or known[0] != state:
            known = self._counts[segment] = (state, sum(1 for _ in _lines([segment])))
        return known[1]

    def _directory(self, model: str) -> Path:
        return self.root / check_name(model)

    def _run(self) -> None:
        while (queued := self._queue.get()) is not None:
            record, num_deletions = queued
            try:
                if num_deletions == self._num_deletions.get(record.model, 0):
                    self.write(record)
            except Exception as error:
                self.num_dropped += 1
                logger.warning("a request for %s could not be recorded: %s", record.model, error)


def _trim(segments: Sequence[Path], max_bytes: int) -> None:
    """Deletes the oldest segments until the rest fit into ``max_bytes``."""
    total = sum(segment.stat().st_size for segment in segments)
    for oldest in segments:
        if total <= max_bytes:
            return
        total -= oldest.stat().st_size
        oldest.unlink()


def _ends_whole(file: IO[bytes]) -> bool:
    """Whether the last line was written to its end; a killed process may have left half of one."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _segments(directory: Path) -> list[Path]:
    return (
        sorted(path for path in directory.glob("*.jsonl") if path.stem.isdigit())
        if directory.is_dir()
        else []
    )


def _lines(segments: Sequence[Path]) -> Iterator[bytes]:
    """Whole lines; what a killed process left half-written is passed over."""
    for segment in segments:
        for line in segment.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n") and line.startswith(b"{") and line.rstrip().endswith(b"}"):
                yield line
