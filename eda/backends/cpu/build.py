"""Compiles the C++ passes with the machine's own compiler, once for each version of source, compiler and processor."""

import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = (
    "pass.cpp",
    "mirror.h",
    "draft.h",
    "verification.h",
    "sampling.h",
    "layer.h",
    "attention.h",
    "matrix.h",
    "bfloat16.h",
    "integers.h",
    "simd.h",
    "simd_avx512.h",
    "simd_avx2.h",
    "simd_neon.h",
    "simd_scalar.h",
    "threads.h",
    "governor.h",
)
# Without contraction the same sums come out of every compiler and, but for bfloat16's products, of every processor.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off")
SWITCH = "EDA_CPU_ISA"
"""Environment variable that asks for lesser instructions than the processor's own."""

_IS_ARM = platform.machine() in ("aarch64", "arm64")
_NATIVE = ("-mcpu=native",) if _IS_ARM else ("-march=native",)
_INSTRUCTIONS: dict[str, tuple[str, ...]] = {"native": _NATIVE, "scalar": (*_NATIVE, "-DEDA_SCALAR")}
if not _IS_ARM:
    _INSTRUCTIONS |= {
        "avx2": ("-march=haswell",),
        "avx2-vnni": ("-march=haswell", "-mavxvnni"),
        "avx512": ("-march=skylake-avx512",),
        "avx512-vnni": ("-march=cascadelake",),
    }


def wanted_instructions() -> str:
    """What ``EDA_CPU_ISA`` names. Raises ``ValueError`` for a name that this kind of processor does not have."""
    name = os.environ.get(SWITCH) or "native"
    if name not in _INSTRUCTIONS:
        raise ValueError(f"{SWITCH} is {name!r}; here it can be {', '.join(_INSTRUCTIONS)}")
    return name


def can_run(instructions: str) -> bool:
    """Whether the passes have vectors for this processor: AVX2 or better on x86-64, any on 64-bit ARM."""
    if _IS_ARM or instructions == "scalar":
        return True
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def built(compiler: str, instructions: str) -> Path:
    """Path of the library, built first where it is not there yet. Raises ``OSError`` when that fails."""
    here = Path(__file__).parent / "csrc"
    flags = (*FLAGS, *_INSTRUCTIONS[instructions])
    digest = hashlib.sha256(" ".join([compiler, *flags, processor()]).encode())
    for name in SOURCES:
        digest.update((here / name).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eda-server"
    library = cache / f"passes-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Several processes may build at once; each renames its own file into place.
        handle, partial = tempfile.mkstemp(suffix=".so", dir=cache)
        os.close(handle)
        try:
            command = [compiler, *flags, str(here / SOURCES[0]), "-o", partial]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            os.replace(partial, library)
        except subprocess.CalledProcessError as error:
            raise OSError(f"{' '.join(command)} failed: {error.stderr[-2000:]}") from error
        finally:
            Path(partial).unlink(missing_ok=True)
    return library


def processor() -> str:
    """What ``-march=native`` depends on: this processor's flags, or its name where the system lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
