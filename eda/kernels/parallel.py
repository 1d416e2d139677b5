"""How many threads the C++ passes use, and keeping torch's own out of their way."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Kept(threading.local):
    """Torch's setting outside of ``kernel_threads_only``; as torch's own, it is one for each Python thread."""

    count: int | None = None


_kept = _Kept()


def num_threads() -> int:
    """Threads of a C++ pass: torch's setting, or what it was when ``kernel_threads_only`` began."""
    return torch.get_num_threads() if _kept.count is None else _kept.count


@contextmanager
def kernel_threads_only() -> Iterator[None]:
    """Inside, torch's own operations run on the calling thread alone.

    Threads of OpenMP spin for about a millisecond after each parallel operation, on the very cores that the next pass
    needs. Between two passes torch only does small things, which lose nothing on one thread.
    """
    if _kept.count is not None:
        yield
        return
    count = _kept.count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _kept.count = None
