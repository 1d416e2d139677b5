"""Files that survive a crash, hashes of files, and the names of files that more than one package knows.

A rename is atomic, but only what was synced before it is durable: contents first, then the rename, then the directory.
Nothing here needs torch: a worker that waits for jobs has not loaded it.
"""

import hashlib
import os
import uuid
from pathlib import Path

PRIVATE_WEIGHTS_FILE = "private.safetensors"
"""The weights of a private module, where it is trained and in each version of an adapter."""

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
"""Of weights whose format can run code when it is loaded."""


def sync_directory(path: Path) -> None:
    """Makes the entries of directory ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces ``path`` as a whole: readers see the old content or the new one, also after a power loss.

    Raises ``OSError`` when it cannot be written; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sha256_of_file(path: Path) -> str:
    """SHA-256 (hex) of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
