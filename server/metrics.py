"""Prometheus metrics, under the names that benchmark clients of vLLM read, with labels for adapters."""

from collections.abc import Callable
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from eda.errors import NonFiniteLogitsError
from eda.server.engine.sequence import Sequence, SequenceLabels, StepStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "adapter", "adapter_version", "draft")

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0, 60.0)
_TOKEN_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.5, 5.0)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


@lru_cache(maxsize=4096)
def _values(labels: SequenceLabels) -> tuple[str, ...]:
    version = "" if labels.adapter_version is None else str(labels.adapter_version)
    return labels.model_name, labels.adapter or "", version, labels.draft


class ServerMetrics:
    """Counters of one server, in a registry of its own. ``on_step_stats`` and ``on_finish`` are the engine's hooks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.drafts = self._counter("vllm:spec_decode_num_drafts", "Decoding passes with a draft")
        self.draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Draft tokens proposed")
        self.accepted_tokens = self._counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted")
        self.accepted_per_position = self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted at each place of a draft",
            "position",
        )
        self.target_passes = self._counter("eda:target_passes", "Decoding passes of the target")
        self.emitted_tokens = self._counter(
            "eda:emitted_tokens",
            "Tokens that decoding passes emitted; over eda:target_passes: acceptance length",
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of finished sequences")
        self.generation_tokens = self._counter(
            "vllm:generation_tokens", "Tokens generated for finished sequences"
        )
        self.finished = self._counter(
            "vllm:request_success", "Finished sequences by reason", "finished_reason"
        )
        self.non_finite = self._counter(
            "eda:non_finite_logits", "Sequences that ended because the target's logits were not finite"
        )
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN_BUCKETS
        )
        self.between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds", "Mean time between a sequence's tokens", _TOKEN_BUCKETS
        )
        self.request_latency = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token", _REQUEST_BUCKETS
        )
        self.running = Gauge("vllm:num_requests_running", "Sequences in the batch", registry=self.registry)
        self.waiting = Gauge("vllm:num_requests_waiting", "Sequences in the queue", registry=self.registry)

        self.cache_slots = Gauge(
            "eda_cache_slots", "Token slots of the key/value cache", ("state",), registry=self.registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*LABELS, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, LABELS, buckets=buckets, registry=self.registry)

    def watch(self, num_running: Callable[[], int], num_waiting: Callable[[], int]) -> None:
        """Sets where the gauges read from."""
        self.running.set_function(num_running)
        self.waiting.set_function(num_waiting)

    def watch_cache(self, num_free: Callable[[], int], num_slots: int) -> None:
        """Sets where the gauge of the cache's slots reads from."""
        self.cache_slots.labels("free").set_function(num_free)
        self.cache_slots.labels("used").set_function(lambda: num_slots - num_free())

    def on_step_stats(self, stats: list[StepStats]) -> None:
        for step in stats:
            values = _values(step.labels)
            self.target_passes.labels(*values).inc()
            self.emitted_tokens.labels(*values).inc(step.num_emitted)
            if step.num_draft_tokens:
                self.drafts.labels(*values).inc()
                self.draft_tokens.labels(*values).inc(step.num_draft_tokens)
                self.accepted_tokens.labels(*values).inc(step.num_accepted)
                for position in range(step.num_accepted):
                    self.accepted_per_position.labels(*values, str(position)).inc()

    def on_finish(self, sequence: Sequence) -> None:
        values = _values(sequence.labels)
        timing = sequence.timing
        self.finished.labels(*values, str(sequence.finish_reason)).inc()
        self.generation_tokens.labels(*values).inc(sequence.num_output_tokens)
        if isinstance(sequence.failure, NonFiniteLogitsError):
            self.non_finite.labels(*values).inc()
        if timing.first_token is None or timing.last_token is None:
            return
        self.prompt_tokens.labels(*values).inc(sequence.num_prompt_tokens)
        self.first_token.labels(*values).observe(timing.first_token - timing.submitted)
        self.request_latency.labels(*values).observe(timing.last_token - timing.submitted)
        if sequence.num_output_tokens > 1:
            seconds = timing.last_token - timing.first_token
            self.between_tokens.labels(*values).observe(seconds / (sequence.num_output_tokens - 1))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
