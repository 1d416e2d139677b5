"""Model directories on disk: which safetensors files they hold, and where each tensor belongs in the fused weights."""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from eda.config import ModelConfig, read_json
from eda.errors import CheckpointError, UnsupportedModelError
from eda.files import PICKLE_SUFFIXES

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_FLOAT_TYPES = ("F32", "BF16", "F16", "F64")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a safetensors file. ``start`` and ``end`` are byte offsets in the file."""

    file: Path
    dtype: str
    """The format's name, e.g. ``"BF16"``."""
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """The tensors of one model directory, whatever files they are spread over. Reads on demand."""

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.entries = dict(entries)
        self.metadata = dict(metadata)
        """The files' own string pairs, merged."""
        self._handles: dict[Path, Any] = {}

    @classmethod
    def of_model(cls, path: Path) -> Self:
        """A full checkpoint: ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.

        Raises:
            CheckpointError: no weights, pickle weights only, a shard or tensor is missing, a file is corrupt.
            UnsupportedModelError: a tensor is neither float32, bfloat16, float16 nor float64.
        """
        if (path / INDEX_FILE).exists():
            return cls._sharded(path)
        return cls._of_files(path, [_existing(path, WEIGHTS_FILE)])

    @classmethod
    def of_adapter(cls, path: Path) -> Self:
        """A PEFT adapter: ``adapter_model.safetensors``. Raises like ``of_model``."""
        return cls._of_files(path, [_existing(path, ADAPTER_WEIGHTS_FILE)])

    @classmethod
    def _sharded(cls, path: Path) -> Self:
        weight_map = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX_FILE} has no weight_map from tensor names to files")
        shards = sorted(set(map(str, weight_map.values())))
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{path / INDEX_FILE} names {shard!r}; shards must lie beside the index"
                )
            if not (path / shard).is_file():
                raise CheckpointError(
                    f"{path} lacks {shard}, one of {len(shards)} shards that its index names"
                )
        checkpoint = cls._of_files(path, [path / shard for shard in shards])
        absent = [
            name for name, shard in weight_map.items() if not checkpoint._is_in(name, path / str(shard))
        ]
        if absent:
            raise CheckpointError(
                f"{path}: the shards lack tensors that the index promises: {listed(absent)}"
            )
        return checkpoint

    @classmethod
    def _of_files(cls, path: Path, files: Sequence[Path]) -> Self:
        entries: dict[str, TensorEntry] = {}
        metadata: dict[str, str] = {}
        for file in files:
            found, pairs = read_header(file)
            twice = sorted(entries.keys() & found.keys())
            if twice:
                raise CheckpointError(f"{path} holds tensors twice: {listed(twice)}")
            entries |= found
            metadata |= pairs
        odd = sorted({entry.dtype for entry in entries.values()} - set(_FLOAT_TYPES))
        if odd:
            raise UnsupportedModelError(
                f"{path} has tensors of type {', '.join(odd)}; supported are {', '.join(_FLOAT_TYPES)}"
            )
        return cls(path, entries, metadata)

    def _is_in(self, name: str, file: Path) -> bool:
        return name in self.entries and self.entries[name].file == file

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU, in its stored type. Raises ``CheckpointError`` when it is missing."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        file = self.entries[name].file
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt", device="cpu")
            tensor: Tensor = self._handles[file].get_tensor(name)
        except Exception as error:  # safetensors raises its own type and plain OSErrors
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        return tensor


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensor entries and metadata of a safetensors file. Raises ``CheckpointError`` when it is not one."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        data_start = 8 + length
        entries = {
            name: TensorEntry(
                file=file,
                dtype=str(entry["dtype"]),
                shape=tuple(map(int, entry["shape"])),
                start=data_start + int(entry["data_offsets"][0]),
                end=data_start + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    if any(not data_start <= entry.start <= entry.end <= size for entry in entries.values()):
        raise CheckpointError(f"{file} is cut off: its header describes more than its {size} bytes")
    return entries, metadata


def resolve_directory(path_or_hub_id: str | Path) -> Path:
    """A local directory as it is; a hub id (``owner/name``) is downloaded: JSON and safetensors files only.

    Raises ``CheckpointError`` when there is neither.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if name and path.is_dir():
        return path
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


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear layer of a checkpoint and its place in the fused weights of this package."""

    fused: str
    """``"qkv"``, ``"output"``, ``"gate_up"`` or ``"down"``."""
    in_size: int
    out_start: int
    """First output row in the fused matrix."""
    out_size: int


def layer_projections(config: ModelConfig) -> dict[str, Projection]:
    """The linear layers of a decoder layer, by their names in a checkpoint."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.query_size, config.kv_size
    return {
        "self_attn.q_proj": Projection("qkv", hidden, 0, query),
        "self_attn.k_proj": Projection("qkv", hidden, query, kv),
        "self_attn.v_proj": Projection("qkv", hidden, query + kv, kv),
        "self_attn.o_proj": Projection("output", query, 0, hidden),
        "mlp.gate_proj": Projection("gate_up", hidden, 0, inner),
        "mlp.up_proj": Projection("gate_up", hidden, inner, inner),
        "mlp.down_proj": Projection("down", inner, 0, hidden),
    }


def copy_weights(
    checkpoint: Checkpoint, destinations: Mapping[str, Tensor], ignored: re.Pattern[str]
) -> None:
    """Copies every tensor of ``checkpoint`` to its destination, converting the type.

    Args:
        destinations: by name in the checkpoint; views of the model's weights.
        ignored: names that may be present without a destination.

    Raises:
        CheckpointError: tensors are missing, misshapen, or have no destination.
    """
    missing = [name for name in destinations if name not in checkpoint]
    unknown = [n for n in checkpoint.entries if n not in destinations and not ignored.search(n)]
    if missing or unknown:
        parts = [f"missing: {listed(missing)}"] if missing else []
        parts += [f"without use in this architecture: {listed(unknown)}"] if unknown else []
        raise CheckpointError(
            f"{checkpoint.path} does not hold the tensors of its config; {'; '.join(parts)}"
        )
    misshapen = [
        f"{name} is {list(checkpoint.entries[name].shape)}, its config asks for {list(view.shape)}"
        for name, view in destinations.items()
        if checkpoint.entries[name].shape != tuple(view.shape)
    ]
    if misshapen:
        raise CheckpointError(f"{checkpoint.path} has misshapen tensors: {listed(misshapen)}")
    with torch.no_grad():
        for name, view in destinations.items():
            view.copy_(checkpoint.tensor(name))


def vocabulary(path: Path) -> Any:
    """The tokens of ``tokenizer.json`` with their ids, in a form to compare; ``None`` when there is no such file."""
    file = path / "tokenizer.json"
    if not file.exists():
        return None
    return (read_json(file).get("model") or {}).get("vocab")


def listed(names: Sequence[str], limit: int = 4) -> str:
    """The first ``limit`` of ``names`` as text, with the number of the rest."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _existing(path: Path, name: str) -> Path:
    if (path / name).is_file():
        return path / name
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{path} has weights as pickle only ({listed(pickles)}), which can run code when loaded; "
            f"{name} is needed (convert with safetensors)"
        )
    raise CheckpointError(f"{path} has no weights: {name} is needed")
