"""Which model directories a server loads, and loading them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from eda.backends.loading import load_target
from eda.draft import DraftModel
from eda.model_files import is_gguf
from eda.target import TargetModel
from server.settings import BUNDLED_MODELS, ConfigurationError, Settings

NOT_FINE_TUNES = frozenset({"base", "draft", "adapters"})


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """Directories after all defaults; ``target`` may be a GGUF file. ``draft`` is ``None`` for a server without one."""

    target: Path
    draft: Path | None
    fine_tunes: dict[str, Path]
    bundled_adapters: Path | None


def model_paths(settings: Settings) -> ModelPaths:
    """Raises ``ConfigurationError`` for directories that do not exist.

    Without ``target``, everything comes from ``models_dir``; with it, nothing does that is not named.
    """
    target = settings.target
    draft = settings.draft
    fine_tunes = dict(settings.fine_tunes)
    bundled = settings.bundled_adapters
    if target is None:
        family = settings.models_dir
        target = family / "base"
        if not (target / "config.json").is_file():
            where = "the bundled models" if family == BUNDLED_MODELS else "models_dir"
            raise ConfigurationError(
                f"{where} are not there: {target} holds no model. Check out the project's models/ directory, make it "
                "with recipes/, or name a model of your own with --target (or EDA_TARGET)"
            )
        if draft is None and (family / "draft" / "config.json").is_file():
            draft = family / "draft"
        if not fine_tunes:
            fine_tunes = _fine_tunes_in(family)
        if bundled is None and (family / "adapters").is_dir():
            bundled = family / "adapters"
    for name, path in {"target": target, "draft": draft, **fine_tunes}.items():
        if name == "target" and is_gguf(target):
            if not target.is_file():
                raise ConfigurationError(f"target: there is no file {target}")
        elif path is not None and not path.is_dir():
            raise ConfigurationError(f"{name}: there is no directory {path}")
    return ModelPaths(target, None if settings.no_draft else draft, fine_tunes, bundled)


def _fine_tunes_in(family: Path) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(family.iterdir())
        if path.name not in NOT_FINE_TUNES
        and ((path / "config.json").is_file() or (path / "adapter_config.json").is_file())
    }


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


def load_pair(paths: ModelPaths, device: torch.device, dtype: str) -> tuple[TargetModel, DraftModel | None]:
    """Target and draft in the same type. Raises ``eda.errors.CheckpointError`` and its kinds."""
    wanted = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    target = load_target(paths.target, dtype=wanted, device=device)
    draft = None
    if paths.draft is not None:
        draft = DraftModel.load(paths.draft, dtype=target.dtype, device=device)
    return target, draft
