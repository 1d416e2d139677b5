"""Names and paths from outside: what an adapter may be called and which files a request may name."""

import re
from collections.abc import Sequence
from pathlib import Path

from eda.adapters.errors import InvalidInputError

MAX_NAME_LENGTH = 64
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MAX_PATH_LENGTH = 4096


def check_name(name: str, *, param: str = "name") -> str:
    """The name itself, when it may become a directory, a label and a part of a URL.

    Raises ``InvalidInputError`` otherwise. Names differ by more than case on some file systems only, so callers
    compare them through ``fold_name``.
    """
    if not name or len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name) or ".." in name:
        raise InvalidInputError(
            f"{param} is {name[:80]!r}; it must be 1 to {MAX_NAME_LENGTH} characters of A-Z a-z 0-9 . _ -, "
            "begin and end with a letter or digit, and hold no '..'",
            param=param,
        )
    return name


def fold_name(name: str) -> str:
    """The form under which two names count as the same one."""
    return name.casefold()


def check_hub_id(hub_id: str, *, param: str = "target.hub_id") -> str:
    """The id itself, when it has the form ``owner/name``. Raises ``InvalidInputError`` otherwise."""
    if not _HUB_ID.fullmatch(hub_id) or ".." in hub_id:
        raise InvalidInputError(
            f"{param} is {hub_id[:120]!r}; it must look like 'owner/name' (letters, digits, . _ -)",
            param=param,
        )
    return hub_id


class AllowedRoots:
    """The directories that paths in requests may lead into."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(Path(root).expanduser().resolve() for root in roots)

    def resolve(self, path: str, *, param: str) -> Path:
        """The real path, symbolic links followed, of something that exists below a root.

        A relative path is tried below each root in order.

        Raises:
            InvalidInputError: it is malformed, leads out of the roots, or does not exist. The message is the same
                for "exists outside" and "does not exist", so a request cannot be used to explore the disk.
        """
        if not path or len(path) > MAX_PATH_LENGTH or "\x00" in path:
            raise InvalidInputError(
                f"{param} is {path[:80]!r}; it must be a path of 1 to {MAX_PATH_LENGTH} characters",
                param=param,
            )
        given = Path(path)
        for candidate in [given] if given.is_absolute() else [root / given for root in self.roots]:
            try:
                real = candidate.resolve(strict=True)
            except (OSError, RuntimeError):  # missing, unreadable, or a loop of links
                continue
            if any(real.is_relative_to(root) for root in self.roots):
                return real
        allowed = ", ".join(str(root) for root in self.roots) or "none is configured"
        raise InvalidInputError(
            f"{param} is {path[:200]!r}; nothing exists there below the allowed directories ({allowed})",
            param=param,
        )
