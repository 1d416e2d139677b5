"""What tests of the C++ passes share."""

from collections.abc import Iterator

import pytest
import torch

from eda.backends.cpu.library import kernels


@pytest.fixture(scope="session")
def _needs_kernels() -> None:
    if kernels() is None:
        pytest.skip("the C++ passes cannot run here: no AVX2 or NEON, no C++ compiler, or EDA_CPU_KERNELS=0")


@pytest.fixture
def _own_thread_number() -> Iterator[None]:
    """For tests that set torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
