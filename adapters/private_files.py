"""Who may read what the service keeps: prompts, recorded traffic and weights are for its own user alone."""

import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger(__name__)

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OURS = frozenset({"adapters", "jobs", "traffic"})
"""What a data directory holds, beside the database and locks."""


def private_directory(path: Path) -> None:
    """Makes data directory ``path`` with access for its owner alone, whatever the umask.

    One that is there already is tightened when it is empty or a data directory; anything else (a home directory, a
    shared mount) may be there for others too, so that is left alone with a warning.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & _OTHERS:
        names = {entry.name for entry in path.iterdir()}
        if names and not names & _OURS:
            logger.warning(
                "%s can be read by others, prompts and weights in it too; chmod 700 ends that", path
            )
        else:
            _tighten(path, 0o700)


def private_file(path: Path) -> None:
    """Makes file ``path`` readable and writable for its owner alone: a new, empty one if there is none."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # By the handle: another process may remove the name at any moment, as SQLite does with its files.
        mode = os.fstat(handle).st_mode
    finally:
        os.close(handle)
    if mode & _OTHERS:
        _tighten(path, 0o600)


def _tighten(path: Path, mode: int) -> None:
    try:
        path.chmod(mode)
    except OSError as error:
        logger.warning("%s can be read by others, and that cannot be changed: %s", path, error)
