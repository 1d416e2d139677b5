"""What the settings say about a worker process."""

from pathlib import Path

from eda.adapters.worker.settings import WorkerSettings
from eda.server.model_paths import ModelPaths
from eda.server.settings import Settings


def worker_settings(
    settings: Settings, paths: ModelPaths, draft: Path, *, supervised: bool
) -> WorkerSettings:
    """What a worker beside a server with these settings needs to know."""
    return WorkerSettings(
        data_dir=str(settings.data_dir.resolve()),
        target=str(paths.target.resolve()),
        draft=str(draft.resolve()),
        database_url=database_url(settings),
        bundled_adapters=tuple(str(directory.resolve()) for directory in bundled_directories(paths)),
        num_threads=settings.worker_threads,
        niceness=settings.worker_niceness,
        scheduling=settings.worker_scheduling,
        memory_limit_mib=settings.worker_memory_mib,
        device=settings.device,
        weights=settings.weights,
        supervised=supervised,
    )


def database_url(settings: Settings) -> str:
    """As configured; empty for SQLite in the data directory."""
    return settings.database_url.get_secret_value() if settings.database_url is not None else ""


def bundled_directories(paths: ModelPaths) -> list[Path]:
    return [paths.bundled_adapters] if paths.bundled_adapters is not None else []
