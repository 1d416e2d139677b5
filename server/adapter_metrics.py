"""Prometheus metrics of adapters: live acceptance, what the guard did, jobs by state, the worker."""

from collections.abc import Iterable
from contextlib import suppress

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from eda.adapters.database import UNAVAILABLE
from eda.adapters.service import AdapterService
from eda.server.worker_supervisor import WorkerSupervisor

_LABELS = ("model_name", "adapter_version")


class AdapterMetrics(Collector):
    """Read anew at every scrape."""

    def __init__(self, adapters: AdapterService, worker: WorkerSupervisor | None) -> None:
        self._adapters = adapters
        self._worker = worker

    def describe(self) -> Iterable[Metric]:
        """Nothing: at registration there is no database to read yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        registry = self._adapters.registry
        live = GaugeMetricFamily(
            "eda:adapter_live_acceptance_length",
            "Tokens per target pass over the last requests; version 0 is the shared draft alone",
            labels=_LABELS,
        )
        alarms = GaugeMetricFamily(
            "eda:adapter_acceptance_alarm", "1 while the live acceptance length is near 1", labels=_LABELS
        )
        alarmed = registry.guard.alarmed()
        for model, version in registry.active_versions().items():
            for measured in {version, None}:
                if (figure := registry.guard.live(model, measured)) is not None:
                    live.add_metric((model, str(measured or 0)), figure.mean_acceptance_length)
            alarms.add_metric((model, str(version or 0)), float((model, version) in alarmed))
        rollbacks = CounterMetricFamily(
            "eda:adapter_rollbacks", "Versions that the guard took out of service", labels=("model_name",)
        )
        for model, count in dict(registry.num_rollbacks).items():
            rollbacks.add_metric((model,), count)
        yield from (live, alarms, rollbacks)
        yield from self._jobs()

    def _jobs(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily("eda:adaptation_jobs", "Adaptation jobs by state", labels=("state",))
        # Without its database the server goes on answering, and must still be seen to.
        with suppress(*UNAVAILABLE):
            for state, count in self._adapters.queue.counts().items():
                jobs.add_metric((state,), count)
        yield jobs
        if self._worker is not None:
            up = self._worker.pid is not None
            yield GaugeMetricFamily("eda:worker_up", "1 while the worker process runs", value=float(up))
            yield CounterMetricFamily(
                "eda:worker_restarts",
                "Times that the worker died and was started again",
                self._worker.num_restarts,
            )
        dropped = self._adapters.traffic.num_dropped
        yield CounterMetricFamily(
            "eda:traffic_records_dropped", "Requests that could not be recorded", dropped
        )
