"""Puts a server together: models, registry, engine. What `eda serve` runs at start, in a thread."""

from collections.abc import Iterable

import torch

from adapters.loading import ModelLoader
from adapters.service import AdapterService
from adapters.traffic import TrafficRecord
from adapters.watcher import RegistryWatcher
from eda.backends.base import BackendName
from eda.kinds import Speculation
from eda.speculative import SpeculativeDecoder
from server.adaptation import make_adapter_service, make_worker
from server.adapter_metrics import AdapterMetrics
from server.engine.async_engine import AsyncEngine
from server.engine.scheduler import SchedulerLimits
from server.engine.sequence import Sequence
from server.engine.speculation import SpeculationPolicy, SpeculationTable, SpeculationTableError
from server.engine.stopping import FinishReason
from server.logs import logger
from server.models import choose_device, load_pair, model_paths, num_cache_slots
from server.services import Runtime, Services
from server.settings import ConfigurationError, Settings
from server.tokenizer import TextTokenizer


def load_runtime(services: Services) -> Runtime:
    """Loads everything that ``services.settings`` name.

    Raises ``ConfigurationError`` for settings that do not fit, ``eda.errors.EdaError`` for unusable model files.
    """
    settings = services.settings
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    paths = model_paths(settings)
    target, draft = load_pair(paths, choose_device(settings.device), settings.dtype)
    own_limit = target.config.max_position_embeddings
    max_model_len = min(settings.max_model_len or own_limit, own_limit)
    num_slots = num_cache_slots(
        target,
        draft,
        cache_mib=settings.cache_mib,
        max_model_len=max_model_len,
        max_running=settings.max_running,
    )
    decoder = SpeculativeDecoder.for_models(target, draft, num_slots=num_slots, graphs=settings.cuda_graphs)
    table = _table(settings, decoder.backend.name)
    # Part of loading, so that the server is ready when the usual passes are recorded.
    num_graphs = decoder.warm_up(_usual_rounds(table, decoder.backend.usual_batches, settings.max_running))
    tokenizer = TextTokenizer.load(paths.target)

    loader = ModelLoader(target, draft, base_name=settings.model_name)
    adapters = make_adapter_service(settings, loader, paths, max_model_len)
    adapters.configure(paths.fine_tunes)
    watcher = RegistryWatcher(adapters.registry)
    worker = make_worker(settings, paths)
    services.metrics.registry.register(AdapterMetrics(adapters, worker))
    guard = adapters.registry.guard

    def on_finish(sequence: Sequence) -> None:
        services.metrics.on_finish(sequence)
        labels, counts = sequence.labels, sequence.counts
        # The guard compares like with like: requests that ask for another draft are left out, since its baseline is a
        # random share of the same traffic, and so are those for which drafting was paused most of the time.
        if labels.draft == "private" and 0 < counts.num_target_passes <= counts.num_draft_tokens:
            guard.observe(
                labels.model_name, labels.adapter_version, counts.num_target_passes, counts.num_emitted
            )
        if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            _record_traffic(adapters, sequence)

    engine = AsyncEngine(
        decoder,
        SpeculationPolicy(table),
        SchedulerLimits(settings.max_running, settings.max_tokens_per_step),
        max_waiting=settings.max_waiting,
        on_step_stats=services.metrics.on_step_stats,
        on_finish=on_finish,
        on_death=lambda error: services.on_failure(error),
    )
    logger().info(
        "loaded",
        target=str(paths.target),
        draft=str(paths.draft) if paths.draft else None,
        device=str(target.device),
        backend=decoder.backend.name,
        dtype=str(target.dtype).removeprefix("torch."),
        cache_slots=num_slots,
        max_model_len=max_model_len,
        cuda_graphs=num_graphs,
    )

    def start() -> None:
        adapters.traffic.start()
        watcher.start()
        if worker is not None:
            worker.start()

    def close() -> None:
        if worker is not None:
            worker.stop()
        watcher.stop()
        adapters.traffic.stop()
        adapters.database.close()

    return Runtime(engine, adapters.registry, tokenizer, adapters=adapters, on_start=start, on_close=close)


def _record_traffic(adapters: AdapterService, sequence: Sequence) -> None:
    """Keeps prompt and answer for a later adaptation, for models whose administrator asked for it."""
    name = sequence.labels.model_name
    if not adapters.registry.records_traffic(name):
        return
    state, start = sequence.state, sequence.num_prompt_tokens
    adapters.traffic.record(
        TrafficRecord(
            model=name,
            request_id=sequence.request_id,
            prompt_ids=state.token_ids[:start],
            response_ids=state.token_ids[start : start + sequence.num_output_tokens],
            temperature=state.sampling.temperature,
            finish_reason=str(sequence.finish_reason),
        )
    )


def _usual_rounds(
    table: SpeculationTable, batches: Iterable[int], max_running: int
) -> list[tuple[int, Speculation]]:
    """How each of these numbers of sequences drafts, by the table."""
    return [(size, table.level_for(size).speculation()) for size in batches if size <= max_running]


def _table(settings: Settings, backend: BackendName) -> SpeculationTable:
    if settings.calibration is None:
        return SpeculationTable.default(backend)
    try:
        return SpeculationTable.load(settings.calibration)
    except SpeculationTableError as error:
        raise ConfigurationError(f"calibration: {error}") from error
