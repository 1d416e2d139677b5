"""The machine that figures come from."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
"""What the products of this engine and its peers look for."""
_CPUINFO = Path("/proc/cpuinfo")


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields; empty where the system has no such file."""
    if not _CPUINFO.exists():
        return {}
    first = _CPUINFO.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_flags() -> frozenset[str]:
    """All instruction set flags of the processor."""
    fields = _cpuinfo()
    return frozenset(fields.get("flags", fields.get("Features", "")).split())


def description() -> dict[str, Any]:
    """Processor, cores, and which of ``FLAGS`` it has."""
    fields, flags = _cpuinfo(), cpu_flags()
    ids = [fields[name] for name in ("cpu family", "model") if name in fields]
    return {
        "processor": fields.get("model name", platform.machine()) + (f" ({'/'.join(ids)})" if ids else ""),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def load_average() -> float:
    """Processes that wanted to run, as the mean of the last minute."""
    return round(os.getloadavg()[0], 2)


def command(module: str, arguments: Sequence[str] | None) -> str:
    """What was typed to run ``module``."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def print_settings(settings: Mapping[str, Any]) -> None:
    """Says where a run's figures come from, with a warning where they are not worth much."""
    for name, value in settings.items():
        print(f"{name}: {value}")
    if settings["load_average_before"] > 0.5:
        print("warning: other processes are running on this machine; ratios hold, absolute figures may not")
    for feature in settings.get("llama_cpp", {}).get("unused", ()):
        print(f"warning: this llama.cpp was built without {feature}, which the processor has")
    sys.stdout.flush()
