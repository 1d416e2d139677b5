"""The adapter service and the worker process, as the settings ask for them."""

from eda.adapters.database import Database, sqlite_url
from eda.adapters.jobs.queue import JobQueue
from eda.adapters.jobs.workspaces import Workspaces
from eda.adapters.private_files import private_directory
from eda.adapters.service import AdapterService, ServiceSettings
from eda.adapters.serving.catalog import Catalog
from eda.adapters.serving.guard import Guard, GuardSettings
from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.serving.registry import AdapterRegistry
from eda.adapters.serving.traffic import TrafficRecorder
from eda.adapters.store.files import MIB
from eda.adapters.store.names import AllowedRoots
from eda.adapters.store.store import AdapterStore
from eda.adapters.submission import DataLimits
from eda.adapters.worker.settings import DATABASE_FILE
from eda.server.model_paths import ModelPaths
from eda.server.settings import Settings
from eda.server.worker_settings import bundled_directories, database_url, worker_settings
from eda.server.worker_supervisor import WorkerSupervisor


def make_adapter_service(
    settings: Settings, loader: ModelLoader, paths: ModelPaths, max_model_len: int
) -> AdapterService:
    """Everything behind the administrative routes, over ``settings.data_dir``."""
    data_dir = settings.data_dir
    private_directory(data_dir)
    # A worker answers prompts with the model's own limit, not with the one that requests have.
    model_limit = loader.base.model.config.max_position_embeddings
    database = Database(database_url(settings) or sqlite_url(data_dir / DATABASE_FILE))
    registry = AdapterRegistry(
        loader,
        AdapterStore(data_dir / "adapters", bundled_directories(paths)),
        Catalog(database),
        guard=Guard(GuardSettings(baseline_share=settings.baseline_share)),
        max_model_len=max_model_len,
        max_loaded=settings.max_loaded_fine_tunes,
    )
    return AdapterService(
        database,
        registry,
        JobQueue(
            database,
            queue_limit=settings.max_queued_jobs,
            max_attempts=settings.max_job_attempts,
            waits_for="the worker"
            if settings.worker
            else "a worker: this server starts none, `eda worker` does",
        ),
        Workspaces(data_dir / "jobs"),
        TrafficRecorder(data_dir / "traffic", max_bytes=settings.traffic_max_mib * MIB),
        ServiceSettings(
            AllowedRoots([data_dir, settings.models_dir, *settings.adapter_roots]),
            allow_hub=settings.allow_hub,
            has_draft=loader.draft is not None,
            data_limits=DataLimits(
                settings.max_prompt_file_mib * MIB, settings.reserve_disk_mib * MIB, model_limit
            ),
        ),
    )


def make_worker(settings: Settings, paths: ModelPaths) -> WorkerSupervisor | None:
    """The supervisor of the worker, not started; ``None`` when none is wanted or there is no draft to adapt."""
    if not settings.worker or paths.draft is None:
        return None
    return WorkerSupervisor(worker_settings(settings, paths, paths.draft, supervised=True))
