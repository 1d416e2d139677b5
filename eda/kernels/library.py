"""Builds and loads the C++ passes, once for each version of the source and each kind of processor.

They are compiled with the machine's own ``g++`` or ``clang++`` at first use (some seconds) and kept in the user's cache
directory. Without a compiler, or on a processor without AVX512-BF16, there is no library, and models run on torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCES = (
    "pass.cpp",
    "draft.h",
    "verification.h",
    "sampling.h",
    "layer.h",
    "attention.h",
    "matrix.h",
    "threads.h",
    "governor.h",
)
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread")
_SWITCH = "EDA_CPU_KERNELS"
_logger = logging.getLogger(__name__)


class Packed(ctypes.Structure):
    """A weight in the layout that ``matrix.h`` describes."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("scales", ctypes.c_void_p),
    )


class Layer(ctypes.Structure):
    """Weights of one decoder layer; null pointers for parts that it lacks."""

    _fields_ = (
        *((name, Packed) for name in ("qkv", "output", "gate_up", "down")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "attention_norm",
                "feed_forward_norm",
                "qkv_bias",
                "output_bias",
                "query_norm",
                "key_norm",
            )
        ),
    )


class Shape(ctypes.Structure):
    """Sizes that all layers of a model share."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "hidden",
                "heads",
                "key_heads",
                "head_size",
                "qkv_inputs",
                "intermediate",
            )
        ),
        ("eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
    )


class LowRank(ctypes.Structure):
    """Both factors of a low-rank update."""

    _fields_ = (("a", Packed), ("b", Packed))


class LoraLayer(ctypes.Structure):
    """Updates of one layer."""

    _fields_ = tuple((name, LowRank) for name in ("qkv", "output", "gate_up", "down"))


class Segment(ctypes.Structure):
    """Tokens with further weights."""

    _fields_ = (
        ("start", ctypes.c_int32),
        ("end", ctypes.c_int32),
        ("lora", ctypes.c_void_p),
        ("private_gate_up", ctypes.c_void_p),
        ("private_down", ctypes.c_void_p),
    )


class Visible(ctypes.Structure):
    """Keys that a token sees."""

    _fields_ = (
        ("first_slot", ctypes.c_int64),
        ("num_leading", ctypes.c_int32),
        ("num_extra", ctypes.c_int32),
        ("extra", ctypes.c_void_p),
    )


class Tokens(ctypes.Structure):
    """The packed tokens of a pass and the cache that they go to."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("num_segments", ctypes.c_int32),
        ("segments", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("visible", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
    )


class Draft(ctypes.Structure):
    """Weights of a shared draft."""

    _fields_ = (
        ("layer", Layer),
        ("fc", Packed),
        ("tap_norms", ctypes.c_void_p * 3),
        ("hidden_norm", ctypes.c_void_p),
        ("embedding_norm", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("num_columns", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class Sampling(ctypes.Structure):
    """How tokens are drawn; at temperature 0 the likeliest is taken."""

    _fields_ = (
        ("top_p", ctypes.c_double),
        ("temperature", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class VerifiedRow(ctypes.Structure):
    """A sequence whose chain is verified."""

    _fields_ = (
        ("sampling", Sampling),
        ("draft_probs", ctypes.c_void_p),
        ("draft_token_ids", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("num_draft", "num_columns", "first_line", "first_uniform")),
    )


class DraftRow(ctypes.Structure):
    """A sequence that drafts."""

    _fields_ = (
        ("first_slot", ctypes.c_int64),
        ("length", ctypes.c_int32),
        ("num_steps", ctypes.c_int32),
        ("first_token", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
        ("min_probability", ctypes.c_float),
        ("unused", ctypes.c_int32),
        ("sampling", Sampling),
        ("head", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("lora", ctypes.c_void_p),
        ("private_gate_up", ctypes.c_void_p),
        ("private_down", ctypes.c_void_p),
    )


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled passes, or ``None`` where they cannot run or ``EDA_CPU_KERNELS=0`` forbids them."""
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if os.environ.get(_SWITCH) == "0" or not has_bfloat16():
        return None
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        _logger.warning(
            "no C++ compiler (g++ or clang++): models run on torch's own kernels, several times slower"
        )
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    # RuntimeError: the user has no home directory.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _logger.warning("the C++ passes cannot be used, models run on torch's own kernels: %s", error)
        return None


def _built(compiler: str) -> Path:
    """Path of the library; built first where it is not there yet."""
    here = Path(__file__).parent
    digest = hashlib.sha256(" ".join([compiler, *_FLAGS, _processor()]).encode())
    for name in _SOURCES:
        digest.update((here / name).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eda-server"
    library = cache / f"passes-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Several processes may build at once; each renames its own file into place.
        handle, partial = tempfile.mkstemp(suffix=".so", dir=cache)
        os.close(handle)
        try:
            command = [compiler, *_FLAGS, str(here / _SOURCES[0]), "-o", partial]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            os.replace(partial, library)
        except subprocess.CalledProcessError as error:
            raise OSError(f"{' '.join(command)} failed: {error.stderr[-2000:]}") from error
        finally:
            Path(partial).unlink(missing_ok=True)
    return library


def _processor() -> str:
    """What ``-march=native`` depends on: the flags of this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")
