"""Puts a server together: models, registry, engine. What `eda serve` runs at start, in a thread."""

from collections.abc import Iterable

import torch

from eda.adapters.service import AdapterService
from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.serving.traffic import TrafficRecord
from eda.adapters.serving.watcher import RegistryWatcher
from eda.adapters.templates.renderer import TemplateRenderer
from eda.backends.loading import instructions_of
from eda.decoder import SpeculativeDecoder
from eda.formats.chat_template import ChatTemplateError
from eda.formats.tokenizer import TextTokenizer
from eda.formats.tokenizer_files import load_tokenizer
from eda.server.adaptation import make_adapter_service, make_worker
from eda.server.adapter_metrics import AdapterMetrics
from eda.server.cache_size import MIB, choose_cache_size, free_memory
from eda.server.engine.async_engine import AsyncEngine
from eda.server.engine.scheduler import SchedulerLimits
from eda.server.engine.sequence import Sequence
from eda.server.engine.speculation import SpeculationPolicy, SpeculationTable, SpeculationTableError
from eda.server.engine.stopping import FinishReason
from eda.server.logs import logger
from eda.server.model_paths import model_paths
from eda.server.models import choose_device, load_pair
from eda.server.services import Runtime, Services
from eda.server.settings import ConfigurationError, Settings
from eda.speculation.costs import DraftCosts
from eda.speculation.kinds import Speculation


def load_runtime(services: Services) -> Runtime:
    """Loads everything that ``services.settings`` name.

    Raises ``ConfigurationError`` for settings that do not fit, ``eda.errors.EdaError`` for unusable model files.
    """
    settings = services.settings
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    paths = model_paths(settings)
    target, draft = load_pair(paths, choose_device(settings.device), settings.weights)
    cache = choose_cache_size(settings, target, draft, free_bytes=free_memory(target.device))
    own_limit = target.config.max_position_embeddings
    if settings.max_model_len is None and cache.max_model_len < own_limit:
        logger().warning(
            "sequences are limited to what the cache holds; cache_mib makes it larger",
            max_model_len=cache.max_model_len,
            of_the_model=own_limit,
            cache_mib=cache.num_bytes // MIB,
        )
    instructions = instructions_of(target)
    decoder = SpeculativeDecoder.for_models(
        target, draft, num_slots=cache.num_slots, graphs=settings.cuda_graphs
    )
    services.metrics.watch_cache(lambda: decoder.cache.allocator.num_free, cache.num_slots)
    table = _table(settings, decoder.backend.costs)
    # Part of loading, so that the server is ready when the usual passes are recorded.
    num_graphs = decoder.warm_up(_usual_rounds(table, decoder.backend.usual_batches, settings.max_running))
    tokenizer = load_tokenizer(paths.target)
    templates = TemplateRenderer()
    _try_template(tokenizer, templates)

    loader = ModelLoader(target, draft, base_name=settings.model_name, templates=templates)
    adapters = make_adapter_service(settings, loader, paths, cache.max_model_len)
    adapters.configure(paths.fine_tunes)
    watcher = RegistryWatcher(adapters.registry)
    worker = make_worker(settings, paths)
    if worker is None and (num_waiting := adapters.queue.counts()["queued"]):
        reason = "worker is false" if draft is not None else "there is no draft to adapt"
        logger().warning(
            "jobs wait for a worker, and this server starts none", jobs=num_waiting, reason=reason
        )
    services.metrics.registry.register(AdapterMetrics(adapters, worker))
    guard = adapters.registry.guard

    def on_finish(sequence: Sequence) -> None:
        services.metrics.on_finish(sequence)
        labels, counts = sequence.labels, sequence.counts
        # The guard compares like with like: requests that ask for another draft are left out, since its baseline is a
        # random share of the same traffic, and so are those for which drafting was paused most of the time.
        if sequence.prefers_private and 0 < counts.num_target_passes <= counts.num_draft_tokens:
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
        weights=", ".join(target.weight_formats),
        instructions=instructions,
        cache_slots=cache.num_slots,
        cache_mib=cache.num_bytes // MIB,
        max_model_len=cache.max_model_len,
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
        templates.close()

    return Runtime(
        engine,
        adapters.registry,
        tokenizer,
        adapters=adapters,
        templates=templates,
        weights=target.weight_formats,
        instructions=instructions,
        can_draft=draft is not None,
        chat_max_tokens=min(settings.chat_max_tokens, max(1, cache.num_slots // 4)),
        on_start=start,
        on_close=close,
    )


def _try_template(tokenizer: TextTokenizer, templates: TemplateRenderer) -> None:
    """Readies the base's chat template. One that cannot be used is no reason not to serve completions."""
    try:
        if tokenizer.chat_template is not None:
            templates.check(tokenizer.chat_template)
    except ChatTemplateError as error:
        logger().warning("chats of the base will be refused", reason=str(error))


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


def _table(settings: Settings, costs: DraftCosts) -> SpeculationTable:
    if settings.calibration is None:
        return SpeculationTable.default(costs)
    try:
        return SpeculationTable.load(settings.calibration)
    except SpeculationTableError as error:
        raise ConfigurationError(f"calibration: {error}") from error
