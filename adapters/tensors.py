"""A look at a safetensors file before anything is loaded from it.

The header is read and checked on its own: a file that claims tensors larger than itself, overlapping ones or
millions of them is refused at the cost of a few kilobytes, and so is anything else than safetensors (pickle files).
"""

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from adapters.errors import CorruptVersionError
from eda.files import PICKLE_SUFFIXES

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 100_000
_DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_UNSAFE_SUFFIXES = PICKLE_SUFFIXES | {".npy"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type (as safetensors spells it) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of the tensors in ``path``, proven to fit the file exactly.

    Raises ``CorruptVersionError`` when the file is missing, not safetensors, or its header contradicts its size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CorruptVersionError(f"{path} has {size} bytes; a safetensors file has at least 8")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise CorruptVersionError(
                    f"{path} states a header of {header_bytes} bytes; the file has {size} and the limit is "
                    f"{MAX_HEADER_BYTES} (is it a safetensors file?)"
                )
            header = _parse(file.read(header_bytes), path)
    except OSError as error:
        raise CorruptVersionError(f"{path} cannot be read: {error}") from error
    return _check(header, size - 8 - header_bytes, path)


def refuse_unsafe_files(directory: Path) -> None:
    """Raises ``CorruptVersionError`` when ``directory`` holds weights in a format that can run code when loaded."""
    for name in sorted(os.listdir(directory)):
        if Path(name).suffix.lower() in _UNSAFE_SUFFIXES:
            raise CorruptVersionError(
                f"{directory / name} is not safetensors; pickle and array files are refused"
            )


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptVersionError(f"{path} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CorruptVersionError(
            f"{path} has a header that is a JSON {type(header).__name__}; expected an object"
        )
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CorruptVersionError(f"{path} lists {len(header)} tensors; the limit is {MAX_TENSORS}")
    return header


def _check(header: dict[str, Any], data_bytes: int, path: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, start, end)
            sound = all(type(number) is int and number >= 0 for number in numbers) and dtype in _DTYPE_BYTES
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise CorruptVersionError(f"{path}: the header's entry for tensor {name[:80]!r} is malformed")
        if end - start != prod(shape) * _DTYPE_BYTES[dtype]:
            raise CorruptVersionError(
                f"{path}: tensor {name[:80]!r} of shape {list(shape)} and type {dtype} needs "
                f"{prod(shape) * _DTYPE_BYTES[dtype]} bytes; its offsets give {end - start}"
            )
        tensors[name] = TensorInfo(dtype, shape)
        spans.append((start, end))
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise CorruptVersionError(
                f"{path}: tensor data overlaps or has a gap at byte {min(start, position)}"
            )
        position = end
    if position != data_bytes:
        raise CorruptVersionError(
            f"{path} holds {data_bytes} bytes of tensor data; its header describes {position}"
        )
    return tensors
