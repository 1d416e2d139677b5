"""What all tests share."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices run slower on several threads, and results do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _every_log_level() -> None:
    """A server that a test started set the level of its process, which is also that of the tests after it."""
    logging.getLogger("eda").setLevel(logging.NOTSET)
