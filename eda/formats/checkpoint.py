"""Tensors of model directories, and where each belongs in the fused weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import safe_open
from torch import Tensor

from eda.errors import CheckpointError
from eda.formats.checkpoint_files import (
    TensorEntry,
    adapter_entries,
    listed,
    model_entries,
    read_json,
)
from eda.formats.config import ModelConfig
from eda.formats.json_files import MIB
from eda.formats.quantised import QuantisedWeight

MAX_WEIGHT = 65_504.0
"""Largest magnitude of a weight: float16's. Products of larger ones soon leave the range of bfloat16 and float32."""
_MAX_TOKENIZER_BYTES = 128 * MIB
_ROWS_AT_ONCE = 4096


class WeightSource(Protocol):
    """The tensors of a model by Hugging Face's names, whatever format the files have."""

    @property
    def path(self) -> Path: ...

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU, as floats. Raises ``CheckpointError`` when it is missing."""
        ...

    def quantised(self, name: str) -> QuantisedWeight | None:
        """The matrix ``name`` as it is stored in 8 or 4 bits; ``None`` where it is stored as floats."""
        ...

    def is_quantised(self, name: str) -> bool:
        """Whether ``quantised`` has something, without reading it."""
        ...


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
        return cls(path, *model_entries(path))

    @classmethod
    def of_adapter(cls, path: Path) -> Self:
        """A PEFT adapter: ``adapter_model.safetensors``. Raises like ``of_model``."""
        return cls(path, *adapter_entries(path))

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

    def quantised(self, name: str) -> QuantisedWeight | None:
        """``None``: these files hold floats."""
        return None

    def is_quantised(self, name: str) -> bool:
        """Never: these files hold floats."""
        return False


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


def require_tensors(
    checkpoint: WeightSource, destinations: Mapping[str, Tensor], ignored: re.Pattern[str]
) -> None:
    """Compares the headers of ``checkpoint`` with ``destinations``, which may be on the meta device.

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


def copy_weights(checkpoint: WeightSource, destinations: Mapping[str, Tensor]) -> None:
    """Copies tensors of ``checkpoint`` to their destinations, converting the type.

    ``require_tensors`` says whether they fit. Raises ``CheckpointError`` for values that are not finite or beyond
    ``MAX_WEIGHT``.
    """
    with torch.no_grad():
        for name, view in destinations.items():
            weight = checkpoint.quantised(name)
            if weight is not None:
                require_sound(weight, name, checkpoint.path)
                # The float32 values of a whole embedding may not fit the memory.
                for first in range(0, view.shape[0], _ROWS_AT_ONCE):
                    part = slice(first, first + _ROWS_AT_ONCE)
                    view[part].copy_(weight.rows(part).dequantised())
                continue
            tensor = checkpoint.tensor(name)
            require_finite(tensor, name, checkpoint.path)
            view.copy_(tensor)


def require_sound(weight: QuantisedWeight, name: str, path: Path) -> None:
    """``require_finite`` of the values of a quantised weight."""
    largest = weight.scales.float().abs() * 128
    if weight.minimums is not None:
        largest = largest + weight.minimums.float().abs()
    if not largest.numel() or float(largest.max()) <= MAX_WEIGHT:  # false for NaN
        return
    require_finite(weight.dequantised(), name, path)


def require_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Raises ``CheckpointError`` where ``tensor`` holds values that are not finite, or beyond ``MAX_WEIGHT``."""
    if not tensor.numel():
        return
    low, high = (float(value) for value in tensor.aminmax())  # one pass; NaN comes through
    if low >= -MAX_WEIGHT and high <= MAX_WEIGHT:
        return
    if tensor.isfinite().all():
        found = f"values up to {max(-low, high):.3g}, beyond the {MAX_WEIGHT:g} that models compute with"
    else:
        found = "values that are not finite"
    raise CheckpointError(f"{path}: tensor {name!r} holds {found}; the weights are damaged")


def vocabulary(path: Path) -> Any:
    """The tokens of ``tokenizer.json`` with their ids, in a form to compare; ``None`` when there is no such file."""
    file = path / "tokenizer.json"
    if not file.exists():
        return None
    model = read_json(file, max_bytes=_MAX_TOKENIZER_BYTES).get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(found, dict | list):
        raise CheckpointError(f"{file} has no vocabulary (model.vocab)")
    return found
