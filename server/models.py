"""Loading the models of a server."""

import torch

from eda.backends.loading import load_target
from eda.formats.weight_settings import WeightSetting
from eda.models.draft import DraftModel
from eda.models.target import TargetModel
from eda.server.model_paths import ModelPaths
from eda.server.settings import ConfigurationError


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one. Raises ``ConfigurationError`` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(
            f"device is {name!r}; it must be auto, cpu, cuda or cuda:<number>"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device is {name!r}; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device


def load_pair(
    paths: ModelPaths, device: torch.device, weights: WeightSetting
) -> tuple[TargetModel, DraftModel | None]:
    """Target and draft, which compute in the same type. Raises ``eda.errors.CheckpointError`` and its kinds."""
    target = load_target(paths.target, weights=weights, device=device)
    draft = None
    if paths.draft is not None:
        draft = DraftModel.load(paths.draft, dtype=target.dtype, device=device)
    return target, draft
