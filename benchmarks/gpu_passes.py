"""Timing single passes of a target against what the memory of the device allows."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eda.attention import AttentionRow, PackedBatch
from eda.config import ModelConfig, RopeConfig
from eda.kv_cache import KVCache
from eda.target import TargetModel


@dataclass(frozen=True, slots=True)
class PassTiming:
    """Seconds of one target pass, its head included. ``limit`` is what reading its bytes once would take.

    ``replayed`` is the same pass captured as a CUDA graph, ``None`` where there are none.
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
    graphs: bool,
) -> tuple[PassTiming, str | None]:
    """Times a pass in which each of ``batch`` sequences computes ``tokens`` behind ``context`` cached ones.

    Returns the timing, and why there is no graph where one was asked for.
    """
    device, length = model.device, context + tokens
    cache = model.new_cache(batch * length)
    ids = torch.arange(batch * tokens, device=device) % model.config.vocab_size
    offsets = torch.arange(context, length, device=device)
    positions = offsets.repeat(batch)
    slots = torch.cat([offsets + row * length for row in range(batch)])
    rows = [AttentionRow(row * tokens, tokens, row * length, length) for row in range(batch)]
    packed = PackedBatch(positions, slots, rows, positions + 1)

    def run() -> Tensor:
        output = model(ids, packed, cache)
        return model.logits(output.hidden)

    seconds = seconds_of(run, device, repeats)
    replayed, reason = None, None
    if graphs:
        try:
            replayed = seconds_of(_captured(run, device), device, repeats)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    limit = bytes_read(model, batch, context) / bandwidth
    return PassTiming(batch, tokens, context, seconds, replayed, limit), reason


def _captured(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """``run`` as a CUDA graph. Raises ``RuntimeError`` for a pass that waits for the host somewhere."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose and allocate in their first calls, which a capture must not see
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
