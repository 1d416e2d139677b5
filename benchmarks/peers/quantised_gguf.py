"""GGUF files in the formats that users of llama.cpp pick, by its own quantiser."""

import ctypes
from collections import Counter
from pathlib import Path

from benchmarks.peers.interface import MissingPeerError, require
from benchmarks.peers.llama_context import library

FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}
"""``LLAMA_FTYPE_MOSTLY_*`` of llama.h."""


def quantise(source: Path, destination: Path, kind: str, threads: int) -> Path:
    """Writes the GGUF file ``source`` (of floats) in another format unless ``destination`` is there.

    llama.cpp chooses tensor by tensor: its ``q4_0`` keeps the output layer in more bits, and widths that are no
    multiple of 256 leave the K-quants. ``tensor_types`` says what a file holds.

    Raises:
        MissingPeerError: llama-cpp-python is not installed, or cannot write this file.
    """
    llama_cpp = library()
    if destination.exists():
        return destination
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = FILE_TYPES[kind], threads
    unfinished = destination.with_suffix(".unfinished")
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(unfinished).encode(), ctypes.byref(options)
    )
    if status:
        raise MissingPeerError(f"llama.cpp could not write {kind} (status {status})")
    unfinished.rename(destination)
    return destination


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of a GGUF file have each type."""
    gguf = require("gguf", "gguf")
    return dict(Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors))
