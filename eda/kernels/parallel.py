"""How many threads the C++ passes use, and keeping torch's own out of their way."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_count: int | None = None


def num_threads() -> int:
    """Threads of a C++ pass: torch's setting, or what it was when ``kernel_threads_only`` began."""
    return torch.get_num_threads() if _count is None else _count


@contextmanager
def kernel_threads_only() -> Iterator[None]:
    """Inside, torch's own operations run on the calling thread alone.

    Threads of OpenMP spin for about a millisecond after each parallel operation, on the very cores that the next pass
    needs. Between two passes torch only does small things, which lose nothing on one thread.
    """
    global _count
    if _count is not None:
        yield
        return
    _count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_count)
        _count = None
