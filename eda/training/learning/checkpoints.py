"""Training state on disk: one safetensors file, replaced atomically, so that interrupted runs go on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eda.errors import DataError, MismatchError
from eda.training.files import write_bytes_atomically
from eda.training.learning.optimizer import MuonAdamW
from eda.training.learning.trainees import Trainee


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        step: optimiser steps that are done.
        best: trained tensors at the best held-out score so far; empty before the first measurement.
        history: points of the curves, in order.
        train_seconds: spent in optimiser steps; measuring and loading are not in it.
        seconds: of each part of the run when it was last saved, see ``stopwatch.Part``.
    """

    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = float("-inf")
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


def save_state(path: Path, state: TrainingState, trainee: Trainee, optimizer: MuonAdamW, run: str) -> None:
    """Writes weights, optimiser and ``state``. ``run`` identifies data and settings, see ``load_state``.

    Raises ``TrainingError`` when the file cannot be written.
    """
    tensors = {f"best.{name}": tensor for name, tensor in state.best.items()}
    for name, parameter in trainee.parameters.items():
        tensors[f"weight.{name}"] = parameter.detach()
    tensors |= optimizer.state()
    described = {
        "run": run,
        "step": state.step,
        "best_score": state.best_score if state.best else None,
        "best_step": state.best_step,
        "history": state.history,
        "train_seconds": state.train_seconds,
        "seconds": state.seconds,
    }
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes_atomically(path, save(contiguous, metadata={"state": json.dumps(described)}))


def load_state(path: Path, trainee: Trainee, optimizer: MuonAdamW, run: str) -> TrainingState | None:
    """Puts weights and optimiser back and returns the state; ``None`` when there is no file.

    Raises:
        DataError: the file is damaged.
        MismatchError: it belongs to a run with other data or settings.
    """
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            described: dict[str, Any] = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is no readable checkpoint ({error}); remove it to start again") from error
    if described["run"] != run:
        raise MismatchError(
            f"{path} belongs to a run with other data or settings; remove it or choose another output directory"
        )
    trainee.load(_part(tensors, "weight."))
    optimizer.load(tensors, int(described["step"]))
    best = {
        name: tensor.to(trainee.parameters[name].device) for name, tensor in _part(tensors, "best.").items()
    }
    return TrainingState(
        step=int(described["step"]),
        best=best,
        best_score=float(described["best_score"]) if best else float("-inf"),
        best_step=int(described["best_step"]),
        history=list(described["history"]),
        train_seconds=float(described["train_seconds"]),
        seconds=dict(described.get("seconds", {})),  # earlier versions did not keep them
    )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
