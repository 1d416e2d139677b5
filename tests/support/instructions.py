"""Builds of the C++ passes for other instructions than this processor's best."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from eda.backends.cpu.build import processor
from eda.backends.cpu.library import kernels

# What of the flags in /proc/cpuinfo each build needs; ``native`` comes last.
_NEEDED = {
    "scalar": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx2-vnni": ("avx2", "avx_vnni"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512-vnni": ("avx512f", "avx512_vnni"),
    "native": (),
}
NAMES = tuple(_NEEDED)


@contextmanager
def build_for(name: str) -> Iterator[None]:
    """Passes inside are those for ``name``, a value of ``EDA_CPU_ISA``; skips where they cannot run."""
    flags = processor().split()
    missing = [flag for flag in _NEEDED[name] if flag not in flags]
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDA_CPU_ISA", name)
        kernels.cache_clear()
        try:
            if kernels() is None:
                pytest.skip("the C++ passes cannot run here: no C++ compiler, or EDA_CPU_KERNELS=0")
            yield
        finally:
            kernels.cache_clear()
