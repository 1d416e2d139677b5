"""Files of training stages: atomic JSON, samples appended line by line, and what an artefact records of its making."""

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eda.errors import DataError, TrainingError
from eda.files import write_atomically
from eda.formats.json_files import read_json

_PACKAGES = ("eda-server", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Replaces ``path`` as a whole; a reader never sees half of it, also after a crash.

    Raises ``TrainingError`` when it cannot be written, for instance because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error}") from error


def write_json(path: Path, document: Any) -> None:
    """Writes ``document`` atomically; NaN and infinities are refused with ``ValueError``."""
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes_atomically(path, (text + "\n").encode("utf-8"))


def read_json_if_present(path: Path) -> Any:
    """The document in ``path``, or ``None`` when there is no such file. Raises ``DataError`` when it is not JSON."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


class LineWriter:
    """Appends JSON lines, synced to disk every ``sync_every`` lines and at the end.

    A last line that an interruption cut in half is removed on opening, so that the next one starts cleanly.
    """

    def __init__(self, path: Path, *, sync_every: int = 32) -> None:
        self._path = path
        self._sync_every = sync_every
        self._unsynced = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_half_line(path)
            self._stream = path.open("ab")
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._sync()
        finally:
            with suppress(OSError):
                self._stream.close()

    def write(self, document: Mapping[str, Any]) -> None:
        """Appends one line. Raises ``TrainingError`` when it cannot be written, for instance on a full disk."""
        try:
            self._stream.write(json.dumps(document, ensure_ascii=False).encode("utf-8") + b"\n")
        except OSError as error:
            raise self._failed(error) from error
        self._unsynced += 1
        if self._unsynced >= self._sync_every:
            self._sync()

    def _sync(self) -> None:
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._unsynced = 0

    def _failed(self, error: OSError) -> TrainingError:
        return TrainingError(f"{self._path} cannot be written: {error}; what is there is kept")


def _cut_half_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as stream:
        content = stream.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            stream.truncate(end)


def hash_of_json(document: Any) -> str:
    """SHA-256 (hex) of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode("utf-8")).hexdigest()


def hash_of_lines(lines: Iterable[str]) -> str:
    """SHA-256 (hex) of texts in their order."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def provenance() -> dict[str, Any]:
    """Command, time and versions: what every artefact of a stage records beside its own data and fingerprints."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
    }
