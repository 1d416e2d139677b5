"""Which model directories a server uses, checked as far as that goes without torch."""

from dataclasses import dataclass
from pathlib import Path

from eda.errors import EdaError
from eda.formats.checkpoint_files import is_gguf, require_directory
from eda.formats.preflight import check_draft, check_fine_tune, check_target
from eda.server.settings import BUNDLED_MODELS, ConfigurationError, Settings

NOT_FINE_TUNES = frozenset({"base", "draft", "adapters"})


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """Directories after all defaults; ``target`` may be a GGUF file. ``draft`` is ``None`` for a server without one."""

    target: Path
    draft: Path | None
    fine_tunes: dict[str, Path]
    bundled_adapters: Path | None


def model_paths(settings: Settings) -> ModelPaths:
    """Raises ``ConfigurationError`` for what are no directories.

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
        try:
            if name == "target" and is_gguf(target):
                if not target.is_file():
                    raise ConfigurationError(f"target: there is no file {target}")
            elif path is not None:
                require_directory(path)
        except EdaError as error:
            raise ConfigurationError(f"{name}: {error}") from error
    return ModelPaths(target, None if settings.no_draft else draft, fine_tunes, bundled)


def _fine_tunes_in(family: Path) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(family.iterdir())
        if path.name not in NOT_FINE_TUNES
        and ((path / "config.json").is_file() or (path / "adapter_config.json").is_file())
    }


def check_models(paths: ModelPaths) -> None:
    """Looks at configurations and headers, in milliseconds; loading, which takes longer, checks the rest.

    Raises ``ConfigurationError``, which names the setting.
    """
    checks = [("target", check_target, paths.target)]
    if paths.draft is not None:
        checks.append(("draft", check_draft, paths.draft))
    checks += [(f"fine_tunes.{name}", check_fine_tune, path) for name, path in paths.fine_tunes.items()]
    for name, check, path in checks:
        try:
            check(path)
        except EdaError as error:
            raise ConfigurationError(f"{name}: {error}") from error
