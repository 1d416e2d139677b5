"""How many threads the C++ passes use, and keeping torch's own out of their way."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# Torch's setting outside of ``kernel_threads_only``; as torch's own, it is one for each Python thread.
_kept: ContextVar[int | None] = ContextVar("_kept", default=None)


def num_threads() -> int:
    """Threads of a C++ pass: torch's setting, or what it was when ``kernel_threads_only`` began."""
    count = _kept.get()
    return torch.get_num_threads() if count is None else count


@contextmanager
def kernel_threads_only() -> Iterator[None]:
    """Inside, torch's own operations run on the calling thread alone.

    Threads of OpenMP spin for about a millisecond after each parallel operation, on the very cores that the next pass
    needs. Between two passes torch only does small things, which lose nothing on one thread.
    """
    if _kept.get() is not None:
        yield
        return
    count = torch.get_num_threads()
    token = _kept.set(count)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _kept.reset(token)
