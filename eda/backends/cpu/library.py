"""The C++ passes as a library: its structures and functions, loaded where this processor can run them.

They are compiled with the machine's own ``g++`` or ``clang++`` at first use (see ``build.py``). Without a compiler, or
on a processor with neither AVX2 nor 64-bit ARM's NEON, there is no library, and models run on torch.
"""

import ctypes
import functools
import logging
import os
import shutil
import subprocess

from eda.backends.cpu.build import built, can_run, wanted_instructions

LARGEST_DRAFT_HIDDEN_SIZE = 8192
"""Rows of a draft are normalised on the stack."""

_SWITCH = "EDA_CPU_KERNELS"
_logger = logging.getLogger(__name__)


class Packed(ctypes.Structure):
    """A weight in the layout that ``matrix.h`` describes."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scales", ctypes.c_void_p),
        ("minimums", ctypes.c_void_p),
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


class CLowRank(ctypes.Structure):
    """Both factors of a low-rank update."""

    _fields_ = (("a", Packed), ("b", Packed))


class CLoraLayer(ctypes.Structure):
    """Updates of one layer."""

    _fields_ = tuple((name, CLowRank) for name in ("qkv", "output", "gate_up", "down"))


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


_STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    Packed,
    Layer,
    Shape,
    CLowRank,
    CLoraLayer,
    Segment,
    Visible,
    Tokens,
    Draft,
    Sampling,
    VerifiedRow,
    DraftRow,
)
_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "eda_run_target": (
        *(_INT, _POINTER, _POINTER, _INT),
        *(_POINTER,) * 8,
        *(_INT, _INT, _POINTER, _POINTER),
    ),
    "eda_verify": (_INT, _POINTER, _INT, _POINTER, _INT, *(_POINTER,) * 4),
    "eda_run_head": (_INT, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER),
    "eda_draft_round": (_INT, *(_POINTER,) * 9, _INT, _INT, *(_POINTER,) * 5),
    "eda_run_draft": (_INT, *(_POINTER,) * 5),
    "eda_draft_tree": (_INT, *(_POINTER,) * 7, _INT, _INT, _POINTER, _POINTER),
}


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled passes, or ``None`` where they cannot run or ``EDA_CPU_KERNELS=0`` forbids them.

    Raises ``ValueError`` when ``EDA_CPU_ISA`` names instructions that there are none of.
    """
    instructions = wanted_instructions()
    if os.environ.get(_SWITCH) == "0" or not can_run(instructions):
        return None
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        _logger.warning(
            "no C++ compiler (g++ or clang++): models run on torch's own kernels, several times slower"
        )
        return None
    try:
        library = ctypes.CDLL(str(built(compiler, instructions)))
        _check_mirror(library)
    # RuntimeError: the user has no home directory. AttributeError: a library without these functions.
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        _logger.warning("the C++ passes cannot be used, models run on torch's own kernels: %s", error)
        return None
    for name, types in _ARGUMENTS.items():
        getattr(library, name).argtypes = types
    return library


def absence() -> str:
    """Why ``kernels`` has none."""
    if os.environ.get(_SWITCH) == "0":
        return f"{_SWITCH}=0 forbids them"
    if not can_run(wanted_instructions()):
        return "the processor has neither AVX2 nor 64-bit ARM's NEON"
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "there is no C++ compiler, g++ or clang++"
    return "they could not be compiled, and the log says why"


def instruction_set() -> str | None:
    """What the passes were compiled for, such as ``avx512-bf16+vnni``, ``avx2`` or ``neon``; ``None`` without them."""
    library = kernels()
    if library is None:
        return None
    library.eda_isa.restype = ctypes.c_char_p
    name: bytes = library.eda_isa()
    return name.decode()


def _check_mirror(library: ctypes.CDLL) -> None:
    """Raises ``OSError`` when a structure here is not laid out as in C++."""
    expected = []
    for structure in _STRUCTURES:
        expected += [ctypes.sizeof(structure)]
        expected += [getattr(structure, str(field[0])).offset for field in structure._fields_]
    expected.append(LARGEST_DRAFT_HIDDEN_SIZE)
    sizes = library.eda_sizes
    sizes.restype, sizes.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
    found = (ctypes.c_int64 * sizes(None))()
    sizes(found)
    if list(found) != expected:
        raise OSError(f"its structures are laid out as {list(found)}, library.py's as {expected}")
