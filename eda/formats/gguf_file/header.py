"""The header of a GGUF file: its metadata, and where each tensor lies.

The ``gguf`` package's own reader trusts the counts in a file: one that promises 2**62 elements keeps it busy for ever.
This one reads the same layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3) and
checks every length against the file before it reads or allocates anything; the package gives the types and their sizes.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)
from numpy.typing import NDArray

from eda.errors import CheckpointError, UnsupportedModelError
from eda.formats.checkpoint_files import TensorEntry

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 128 * 1024 * 1024  # vocabularies of 256,000 tokens with their merges take 16 MiB
_MAX_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}

Value = bool | int | float | str | list[str] | NDArray[Any]
"""A metadata value: a scalar, a string, strings, or a NumPy array of scalars."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says about itself."""

    path: Path
    fields: Mapping[str, Value]
    tensors: Mapping[str, TensorEntry]
    """By the file's own names. Shapes are torch's (rows first), types are ggml's names (``"Q4_0"``)."""

    @classmethod
    def read(cls, path: Path) -> "GgufHeader":
        """Raises ``CheckpointError`` for what is no sound GGUF file, ``UnsupportedModelError`` for unknown types."""
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                return _Reader(path, stream, size).header()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def error(self, field: str, found: object, right: str) -> CheckpointError:
        """An error about one field of this file."""
        return CheckpointError(f"{self.path}: {field} is {_shortened(found)}; {right}")

    def integer(self, field: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from ``low`` to ``high``. Without a default the field must be there."""
        value = self.fields.get(field, default)
        right = f"a whole number from {low} to {high} is needed"
        if value is None:
            raise self.error(field, "missing", right)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(field, _described(value), right)
        return value

    def number(self, field: str, low: float, high: float, default: float | None = None) -> float:
        """A number from ``low`` to ``high``. Without a default the field must be there."""
        value = self.fields.get(field, default)
        right = f"a number from {low:g} to {high:g} is needed"
        if value is None:
            raise self.error(field, "missing", right)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(field, _described(value), right)
        return float(value)

    def boolean(self, field: str, default: bool) -> bool:
        value = self.fields.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, _described(value), "true or false is needed")
        return value

    def string(self, field: str, default: str | None = None) -> str:
        """A string. Without a default the field must be there."""
        value = self.fields.get(field, default)
        if not isinstance(value, str):
            found = "missing" if value is None else _described(value)
            raise self.error(field, found, "a string is needed")
        return value

    def strings(self, field: str) -> list[str]:
        """A list of strings; the field must be there."""
        value = self.fields.get(field)
        if not isinstance(value, list):
            found = "missing" if value is None else _described(value)
            raise self.error(field, found, "an array of strings is needed")
        return value

    def numbers(self, field: str, length: int) -> NDArray[Any] | None:
        """An array of ``length`` numbers, or ``None`` where the field is not there."""
        value = self.fields.get(field)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.shape != (length,):
            raise self.error(field, _described(value), f"an array of {length} numbers is needed")
        return value


class _Reader:
    """Reads a header from its start to its end. No read goes past the file's end or the header's greatest size."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path = path
        self._stream = stream
        self._size = size
        self._end = min(size, _MAX_HEADER_BYTES)
        self._position = 0

    def header(self) -> GgufHeader:
        magic = self._bytes(min(4, self._size), "the magic")
        if magic != _MAGIC:
            raise CheckpointError(f"{self._path} begins with {magic!r}; a GGUF file begins with {_MAGIC!r}")
        (version,) = self._unpack("<I", "the version")
        if version not in _VERSIONS:
            is_swapped = version & 0xFFFF == 0
            found = "is big-endian" if is_swapped else f"has version {version} of GGUF"
            raise UnsupportedModelError(
                f"{self._path} {found}; supported are versions {_VERSIONS[0]} and {_VERSIONS[1]}, little-endian"
            )
        tensor_count, field_count = self._unpack("<QQ", "the counts of tensors and fields")
        fields: dict[str, Value] = {}
        for index in range(self._count(field_count, 13, "fields")):
            name = self._string(f"the name of field {index}")
            if name in fields:
                raise CheckpointError(f"{self._path} has the field {name!r} twice; each may be there once")
            fields[name] = self._value(name)
        table = [self._tensor(index) for index in range(self._count(tensor_count, 32, "tensors"))]
        return GgufHeader(self._path, fields, self._placed(table, self._alignment(fields)))

    def _alignment(self, fields: Mapping[str, Value]) -> int:
        alignment = fields.get(_ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self._path}: {_ALIGNMENT} is {alignment!r}; a power of two is needed")
        return alignment

    def _tensor(self, index: int) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, bytes and offset in the data."""
        name = self._string(f"the name of tensor {index}")
        (dimensions,) = self._unpack("<I", f"the dimensions of {name}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} has {dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible"
            )
        sizes = self._unpack(f"<{dimensions}Q", f"the shape of {name}")
        kind, offset = self._unpack("<IQ", f"the type and offset of {name}")
        try:
            quantisation = GGMLQuantizationType(kind)
        except ValueError as error:
            raise UnsupportedModelError(
                f"{self._path}: tensor {name!r} has type {kind}, which gguf does not know"
            ) from error
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
        if 0 in sizes or sizes[0] % block:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} of type {quantisation.name} has the sizes {list(sizes)}; each must be "
                f"positive and the first a multiple of {block}"
            )
        length = block_bytes
        for size in (sizes[0] // block, *sizes[1:]):
            length *= size  # Python's integers do not overflow
        return name, quantisation.name, tuple(reversed(sizes)), length, offset

    def _placed(
        self, table: list[tuple[str, str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, TensorEntry]:
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        free = start
        for name, kind, shape, length, offset in sorted(table, key=lambda entry: entry[4]):
            first, last = start + offset, start + offset + length
            if name in tensors:
                raise CheckpointError(f"{self._path} has the tensor {name!r} twice; each may be there once")
            if last > self._size:
                raise CheckpointError(
                    f"{self._path} is cut off or damaged: tensor {name!r} lies at bytes {first} to {last} of a file "
                    f"of {self._size}"
                )
            if offset % alignment or first < free:
                raise CheckpointError(
                    f"{self._path}: tensor {name!r} has the offset {offset}; it must be a multiple of {alignment} "
                    f"behind the tensor before it, which ends at {free - start}"
                )
            tensors[name] = TensorEntry(self._path, kind, shape, first, last)
            free = last
        return tensors

    def _value(self, name: str) -> Value:
        kind = self._type(name)
        if kind is GGUFValueType.STRING:
            return self._string(name)
        if kind is not GGUFValueType.ARRAY:
            scalar: bool | int | float = self._scalars(kind, 1, name)[0].item()
            return scalar
        kind = self._type(name)
        (length,) = self._unpack("<Q", f"the length of {name}")
        if kind is GGUFValueType.ARRAY:
            raise UnsupportedModelError(
                f"{self._path}: {name} is an array of arrays; arrays of scalars and strings are read"
            )
        if kind is GGUFValueType.STRING:
            return [self._string(name) for _ in range(self._count(length, 8, f"strings of {name}"))]
        return self._scalars(kind, length, name)

    def _type(self, name: str) -> GGUFValueType:
        (kind,) = self._unpack("<I", f"the type of {name}")
        try:
            return GGUFValueType(kind)
        except ValueError as error:
            raise CheckpointError(
                f"{self._path}: {name} has the value type {kind}; GGUF knows 0 to {max(GGUFValueType)}"
            ) from error

    def _scalars(self, kind: GGUFValueType, count: int, name: str) -> NDArray[Any]:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._bytes(count * dtype.itemsize, name), dtype)

    def _string(self, what: str) -> str:
        (length,) = self._unpack("<Q", f"the length of {what}")
        try:
            return self._bytes(length, what).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self._path}: {what} is not UTF-8, which strings must be: {error}"
            ) from error

    def _count(self, count: int, least_bytes: int, what: str) -> int:
        """``count``, if as many items of at least ``least_bytes`` can still follow."""
        if count * least_bytes > self._end - self._position:
            raise self._past_end(f"{count} {what}")
        return count

    def _unpack(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout), what))

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._end - self._position:
            raise self._past_end(what)
        content = self._stream.read(count)
        if len(content) != count:
            raise self._past_end(what)
        self._position += count
        return content

    def _past_end(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is cut off or damaged: {what} at byte {self._position} would go beyond "
            + (
                f"the end of the file ({self._size} bytes)"
                if self._end == self._size
                else f"the {_MAX_HEADER_BYTES} bytes that a header may have"
            )
        )


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.size} {value.dtype}"
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    return repr(value)


def _shortened(found: object) -> str:
    text = str(found)
    return text if len(text) <= 120 else f"{text[:117]}..."
