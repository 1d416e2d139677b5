"""Files of the adapter service: durable trees, deletions that are never seen half-done, locks, free space."""

import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eda.adapters.errors import StorageFullError
from eda.files import sync_directory, write_atomically

MIB = 1024 * 1024


def sync_file(path: Path) -> None:
    """Makes the contents of file ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Makes every file and directory under ``root`` durable."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_file(Path(directory) / name)
        sync_directory(Path(directory))


def write_json_atomically(path: Path, document: Any) -> None:
    """``write_atomically`` for JSON; refuses NaN and infinities with ``ValueError``."""
    write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def remove_tree(path: Path, trash: Path) -> None:
    """Deletes directory ``path`` so that it is never seen half-deleted: it is moved to ``trash`` first.

    ``trash`` is on the same file system. A crash in between leaves only rubbish there, which ``empty_trash`` removes.
    """
    trash.mkdir(parents=True, exist_ok=True)
    doomed = trash / uuid.uuid4().hex
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    sync_directory(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def empty_trash(trash: Path) -> None:
    """Removes what interrupted deletions left."""
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def locked_or_raise(path: Path, *, timeout: float, purpose: str) -> Iterator[None]:
    """``locked``, giving up with ``TimeoutError`` after ``timeout`` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{purpose} is in use by another process ({path})") from error
                time.sleep(0.05)
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on file ``path`` among processes and threads; the system frees it when one is killed."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def require_free_space(directory: Path, num_bytes: int, *, reserve: int = 0, purpose: str) -> None:
    """Raises ``StorageFullError`` when ``directory``'s file system lacks ``num_bytes`` beyond ``reserve`` bytes."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes + reserve:
        raise StorageFullError(
            f"{purpose} needs about {num_bytes / MIB:.1f} MiB and {reserve / MIB:.0f} MiB are kept free; "
            f"the disk of the data directory has {free / MIB:.1f} MiB left"
        )


@contextmanager
def telling_full_disk(what: str) -> Iterator[None]:
    """Turns the system's "no space left" while ``what`` is written into ``StorageFullError``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageFullError(f"{what} cannot be written: {error.strerror}") from error
