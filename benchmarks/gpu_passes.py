"""Timing single passes of a target against what the memory of the device allows."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.backends.base import PassPlan
from eda.backends.eager.target import EagerTarget
from eda.backends.recorded.replay import GraphCache, Recorder, Replay
from eda.backends.recorded.shapes import MAX_TOKENS
from eda.backends.recorded.target import RecordedTarget
from eda.formats.config import ModelConfig, RopeConfig
from eda.models.answers import Need
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.cache import KVCache
from eda.models.target import TargetModel, default_tap_layers
from eda.speculation.rows import PassRow
from eda.transfers import upload


@dataclass(frozen=True, slots=True)
class PassTiming:
    """Seconds of one target pass, its head included. ``limit`` is what reading its bytes once would take.

    ``replayed`` is the same pass from the engine's own recording, ``None`` where there is none.
    """

    batch: int
    tokens: int
    context: int
    seconds: float
    replayed: float | None
    limit: float

    @property
    def share_of_limit(self) -> float:
        return self.limit / self.seconds

    @property
    def replayed_share_of_limit(self) -> float | None:
        return None if self.replayed is None else self.limit / self.replayed


def llama_config(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    max_position_embeddings: int,
    dtype: torch.dtype,
) -> ModelConfig:
    """Sizes of a Llama with an output layer of its own."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        rms_norm_eps=1e-5,
        rope=RopeConfig.default(theta=500_000.0, max_position_embeddings=max_position_embeddings),
        layer_windows=(None,) * num_layers,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        max_position_embeddings=max_position_embeddings,
        eos_token_ids=(),
        dtype=dtype,
    )


@torch.no_grad()
def random_target(config: ModelConfig, device: torch.device, seed: int = 0) -> TargetModel:
    """A target with random weights, made on the device itself."""
    with torch.device("meta"):
        model = TargetModel(config)
    model = model.to(config.dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, 0.02, generator=generator)
    return model.requires_grad_(False)


def synchronise(device: torch.device) -> None:
    """Waits for what was given to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of ``function``, device included, after one call that is not counted."""
    function()
    synchronise(device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, num_bytes: int, repeats: int) -> float:
    """Bytes per second that a copy within the device's memory reads and writes: passes are held against it."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: destination.copy_(source), device, repeats)


def bytes_read(model: TargetModel, batch: int, context: int) -> int:
    """What a pass has to read at least: every weight but the embedding's table, and the cached keys and values."""
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.embedding.numel() * model.embedding.element_size()
    config = model.config
    per_token = KVCache.bytes_per_slot(config.num_layers, config.num_kv_heads, config.head_dim, model.dtype)
    return weights + batch * context * per_token


@torch.inference_mode()
def time_pass(
    model: TargetModel,
    *,
    batch: int,
    tokens: int,
    context: int,
    bandwidth: float,
    repeats: int,
    backend: Recorder | None,
) -> tuple[PassTiming, str | None]:
    """Times a pass in which each of ``batch`` sequences computes ``tokens`` behind ``context`` cached ones.

    Operation by operation, and as the engine replays it: upload and copies of the results included.

    Args:
        backend: makes the recordings; ``None`` times none.

    Returns:
        The timing, and why there is no recording where one was asked for.
    """
    device, length = model.device, context + tokens
    cache = model.new_cache(batch * length + MAX_TOKENS)
    taps = default_tap_layers(model.config.num_layers)
    ids = [index % model.config.vocab_size for index in range(tokens)]
    positions = list(range(context, length))
    rope_lengths = [position + 1 for position in positions]
    rows = [PassRow(ids, positions, rope_lengths, row * length, context, None, 0) for row in range(batch)]
    packed_ids = upload(ids * batch, device)
    batch_rows = [AttentionRow(row * tokens, tokens, row * length, length) for row in range(batch)]
    slots = [row * length + position for row in range(batch) for position in positions]
    placed = upload([positions * batch, slots, rope_lengths * batch], device)
    packed = PackedBatch(placed[0], placed[1], batch_rows, placed[2])

    def run() -> Tensor:
        return model.logits(model(packed_ids, packed, cache, taps=taps).hidden)

    seconds = seconds_of(run, device, repeats)
    replayed, reason = None, None
    if backend is not None:
        reasons = _Reasons(backend)
        recordings = GraphCache(reasons, capture_after=1)
        passes = RecordedTarget(EagerTarget(cache), cache, cache.withhold(MAX_TOKENS), recordings, taps=taps)
        passes.prepare(model, None, batch, tokens, length)
        reason = reasons.reason
        if reason is None:
            replayed = seconds_of(
                lambda: passes.replay(model, rows, PassPlan(Need.LOGITS, taps)), device, repeats
            )
    limit = bytes_read(model, batch, context) / bandwidth
    return PassTiming(batch, tokens, context, seconds, replayed, limit), reason


class _Reasons:
    """Remembers why a recording could not be made."""

    def __init__(self, backend: Recorder) -> None:
        self._backend = backend
        self.reason: str | None = None

    def capture(self, function: Callable[[], None], outputs: Sequence[Tensor]) -> Replay:
        try:
            return self._backend.capture(function, outputs)
        except RuntimeError as error:
            self.reason = str(error).splitlines()[0]
            raise
