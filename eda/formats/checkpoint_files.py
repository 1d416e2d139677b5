"""The files of a model directory and their headers, checked without torch: what is wrong with them is told at once."""

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from eda.errors import CheckpointError, UnsupportedModelError
from eda.files import PICKLE_SUFFIXES
from eda.formats.json_files import MIB, described, open_regular, parse_json
from eda.formats.json_files import read_json as read_json_document

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
MAX_HEADER_BYTES = 16 * MIB
MAX_TENSORS = 100_000
FLOAT_TYPES = ("F32", "BF16", "F16", "F64")
_MAX_SHAPE = 8
_TYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
# Of those the header's sizes are not compared: they may be smaller than a byte.
_OTHER_TYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_gguf(path: str | Path) -> bool:
    """Whether ``path`` names a GGUF file (there or not), by its ending."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a file. ``start`` and ``end`` are byte offsets in the file."""

    file: Path
    dtype: str
    """The format's name, e.g. ``"BF16"``."""
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensor entries and metadata of a safetensors file, proven to fit the file exactly.

    A file that claims tensors larger than itself, overlapping ones or millions of them is refused at the cost of a few
    kilobytes. Raises ``CheckpointError`` for it, and for what is no safetensors file.
    """
    try:
        with open_regular(file) as stream:
            size = file.stat().st_size
            beginning = stream.read(64)
            what = described(beginning)
            if what is not None:
                raise CheckpointError(f"{file} is {what}; a safetensors file is needed")
            if len(beginning) < 8:
                raise CheckpointError(f"{file} has {size} bytes; a safetensors file has at least 8")
            (length,) = struct.unpack("<Q", beginning[:8])
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file} states a header of {length} bytes; the file has {size} and the limit is "
                    f"{MAX_HEADER_BYTES} (is it a safetensors file, and whole?)"
                )
            stream.seek(8)
            header = parse_json(stream.read(length), max_bytes=MAX_HEADER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file} has a header that is a JSON {type(header).__name__}; expected an object"
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: the header's __metadata__ must hold strings")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{file} lists {len(header)} tensors; the limit is {MAX_TENSORS}")
    entries = {name: _entry(file, name, described, 8 + length) for name, described in header.items()}
    _check_spans(file, entries, 8 + length, size)
    return entries, metadata


def _entry(file: Path, name: str, given: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = given["dtype"], tuple(given["shape"]), given["data_offsets"]
        numbers = (*shape, start, end)
        sound = (
            isinstance(dtype, str)
            and (dtype in _TYPE_BYTES or dtype in _OTHER_TYPES)
            and len(shape) <= _MAX_SHAPE
            and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: the header's entry for tensor {name[:80]!r} is malformed")
    if dtype in _TYPE_BYTES and end - start != prod(shape) * _TYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: tensor {name[:80]!r} of shape {list(shape)} and type {dtype} needs "
            f"{prod(shape) * _TYPE_BYTES[dtype]} bytes; its offsets give {end - start}"
        )
    return TensorEntry(file, dtype, shape, data_start + start, data_start + end)


def _check_spans(file: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for start, end in sorted((entry.start, entry.end) for entry in entries.values()):
        if start != position:
            at = min(start, position) - data_start
            raise CheckpointError(f"{file}: tensor data overlaps or has a gap at byte {at}")
        position = end
    if position > size:
        raise CheckpointError(
            f"{file} is cut off: it holds {size - data_start} bytes of tensor data; its header describes "
            f"{position - data_start}"
        )
    if position < size:
        raise CheckpointError(
            f"{file} holds {size - data_start} bytes of tensor data; its header describes {position - data_start}"
        )


def read_json(path: Path, *, max_bytes: int = 16 * MIB) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ``CheckpointError`` when it is missing or something else."""
    try:
        content = read_json_document(path, max_bytes=max_bytes)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a model directory needs one") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; an object was expected")
    return content


def model_entries(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors and metadata of a full checkpoint: one file, or the shards that an index names.

    Raises:
        CheckpointError: no weights, pickle weights only, a shard or tensor is missing, a file is corrupt.
        UnsupportedModelError: a tensor is neither float32, bfloat16, float16 nor float64.
    """
    if (path / INDEX_FILE).exists():
        return _sharded_entries(path)
    return _entries_of(path, [_existing(path, WEIGHTS_FILE)])


def adapter_entries(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The same of a PEFT adapter."""
    return _entries_of(path, [_existing(path, ADAPTER_WEIGHTS_FILE)])


def _sharded_entries(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_FILE} has no weight_map from tensor names to files")
    shards = sorted(set(map(str, weight_map.values())))
    present = {file.name for file in path.iterdir() if file.is_file()}
    for shard in shards:
        if "/" in shard:
            raise CheckpointError(
                f"{path / INDEX_FILE} names {shard[:120]!r}; shards must lie beside the index"
            )
        if shard not in present:
            raise CheckpointError(
                f"{path} lacks {shard[:120]}, one of {len(shards)} shards that its index names"
            )
    entries, metadata = _entries_of(path, [path / shard for shard in shards])
    absent = [
        name
        for name, shard in weight_map.items()
        if name not in entries or entries[name].file != path / str(shard)
    ]
    if absent:
        raise CheckpointError(f"{path}: the shards lack tensors that the index promises: {listed(absent)}")
    return entries, metadata


def _entries_of(path: Path, files: Sequence[Path]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, pairs = read_header(file)
        twice = sorted(entries.keys() & found.keys())
        if twice:
            raise CheckpointError(f"{path} holds tensors twice: {listed(twice)}")
        entries |= found
        metadata |= pairs
    odd = sorted({entry.dtype for entry in entries.values()} - set(FLOAT_TYPES))
    if odd:
        raise UnsupportedModelError(
            f"{path} has tensors of type {listed(odd)}; supported are {', '.join(FLOAT_TYPES)}"
        )
    return entries, metadata


def _existing(path: Path, name: str) -> Path:
    if (path / name).is_file():
        return path / name
    require_directory(path)
    shards = sorted(file.name for file in path.glob("*-of-*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{path} has shards ({listed(shards)}) but no {INDEX_FILE}, which says what they hold; it is downloaded or "
            "saved with them"
        )
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others:
        raise CheckpointError(f"{path} has no {name}; it has {listed(others)}, which must be renamed to that")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{path} has weights as pickle only ({listed(pickles)}), which can run code when loaded; "
            f"{name} is needed (convert with safetensors)"
        )
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(
            f"{path} has no weights as safetensors, but GGUF files ({listed(ggufs)}); {name} is needed"
        )
    raise CheckpointError(f"{path} has no weights: {name} is needed")


def require_directory(path: Path) -> None:
    """Raises ``CheckpointError`` with the cause where ``path`` is no directory."""
    if path.is_dir():
        return
    if not path.exists():
        raise CheckpointError(f"there is no directory {path}")
    what = None
    if path.is_file():
        try:
            with open_regular(path) as stream:
                what = described(stream.read(64))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    raise CheckpointError(
        f"{path} is {what or 'a file'}; a directory with {CONFIG_FILE} and safetensors weights is needed"
    )


def resolve_directory(path_or_hub_id: str | Path) -> Path:
    """A local directory as it is; a hub id (``owner/name``) is downloaded: JSON and safetensors files only.

    Raises ``CheckpointError`` when there is neither.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if name and path.is_dir():
        return path
    if path.is_file():
        require_directory(path)
    if path.exists() or not _HUB_ID.fullmatch(name) or ".." in name:
        raise CheckpointError(f"{name} is neither a model directory nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                ignore_patterns=["original/*", "consolidated*"],  # the same weights in other layouts
            )
        )
    except Exception as error:  # the client raises several families of errors
        raise CheckpointError(f"{name} is no local directory, and the hub gave: {error}") from error


def listed(names: Sequence[str], limit: int = 4) -> str:
    """The first ``limit`` of ``names`` as text, with the number of the rest."""
    rest = len(names) - limit
    shown = [name if len(name) <= 120 else f"{name[:117]}..." for name in names[:limit]]
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
