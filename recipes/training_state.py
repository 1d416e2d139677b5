"""Checkpoints of a running stage, written so that an interruption at any moment leaves a usable one."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes.optimizer import BatchedMuon


@dataclass
class Position:
    """How far training has come."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0  # of training, over all runs; the wall-clock limit counts these


def save_state(path: Path, model: nn.Module, optimizer: BatchedMuon, position: Position) -> None:
    """Write trainable parameters, optimiser and position to one file, replacing an older one in one operation."""
    tensors = {f"optimizer.{name}": tensor.contiguous() for name, tensor in optimizer.state_tensors().items()}
    tensors |= {f"model.{name}": tensor.detach() for name, tensor in _trainable(model).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"position": json.dumps(asdict(position))})
    os.replace(partial, path)


def load_state(path: Path, model: nn.Module, optimizer: BatchedMuon) -> Position | None:
    """Restore what `save_state` wrote; `None` when there is no such file."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        position = Position(**json.loads(file.metadata()["position"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    for name, parameter in _trainable(model).items():
        parameter.data.copy_(tensors[f"model.{name}"])
    prefix = "optimizer."
    optimizer.load_state_tensors(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return position


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class LossLog:
    """JSON lines, one per record, appended to (so that a resumed run continues its log)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record and print it."""
        line = json.dumps(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
