"""Which model directories a server loads."""

from dataclasses import dataclass
from pathlib import Path

from server.settings import BUNDLED_MODELS, ConfigurationError, Settings

NOT_FINE_TUNES = frozenset({"base", "draft", "adapters"})


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """Directories after all defaults. ``draft`` is ``None`` for a server without one."""

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
        if path is not None and not path.is_dir():
            raise ConfigurationError(f"{name}: there is no directory {path}")
    return ModelPaths(target, None if settings.no_draft else draft, fine_tunes, bundled)


def _fine_tunes_in(family: Path) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(family.iterdir())
        if path.name not in NOT_FINE_TUNES
        and ((path / "config.json").is_file() or (path / "adapter_config.json").is_file())
    }
