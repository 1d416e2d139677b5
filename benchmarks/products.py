"""What a pass of the C++ target costs by number of rows, weight format, instruction set and threads.

    python -m benchmarks.products --weights bfloat16 int8 int4 --isa native avx2 --threads 1 2

Weights are random, of the shape of SmolLM2-135M unless options say otherwise. A figure is the least of several passes
over a chain behind ``--context`` tokens; the floor is a plain read of as many bytes as the weights take. On one
thread it is the processor's time, which leaves out what other processes take.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence

import torch

from eda.backends.cpu.library import instruction_set, kernels
from eda.backends.cpu.target import TargetKernel
from eda.backends.cpu.weights import WEIGHT_FORMATS, WeightFormat
from eda.formats.config import ModelConfig, RopeConfig
from eda.models.answers import Need
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.cache import KVCache
from eda.models.layers import DecoderLayer

ROWS = (1, 2, 4, 6, 8, 16)


def shape(arguments: argparse.Namespace) -> ModelConfig:
    """A Llama of the given sizes."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        rms_norm_eps=1e-5,
        rope=RopeConfig.default(theta=10000.0, max_position_embeddings=2048),
        layer_windows=(None,) * arguments.layers,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_ids=(),
        dtype=torch.bfloat16,
    )


def random_kernel(config: ModelConfig, weights: WeightFormat) -> TargetKernel:
    """A target of random weights; the memory of the layers themselves is given back."""
    torch.manual_seed(0)
    layers = []
    for _ in range(config.num_layers):
        layer = DecoderLayer(config).to(torch.bfloat16).requires_grad_(False)
        layers.append(layer)
    head = (torch.randn(config.vocab_size, config.hidden_size) * 0.05).to(torch.bfloat16)
    return TargetKernel(config, layers, torch.ones(config.hidden_size), head, weights=weights)


def pass_over(kernel: TargetKernel, config: ModelConfig, rows: int, context: int) -> Callable[[], object]:
    """One pass over a chain of ``rows`` tokens, with the likeliest token of each."""
    cache = KVCache(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_slots=context + rows,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    cache.keys.normal_()
    cache.values.normal_()
    places = torch.arange(context, context + rows)
    batch = PackedBatch(places, places, [AttentionRow(0, rows, 0, context + rows)])
    embedded = torch.randn(rows, config.hidden_size).to(torch.bfloat16)
    angles = torch.rand(rows, config.head_dim)
    cos, sin = angles.cos(), angles.sin()
    return lambda: kernel.run(
        embedded, batch, cos, sin, cache, (), None, list(range(rows)), need=Need.LIKELIEST
    )


def least(function: Callable[[], object], seconds: float) -> float:
    """The least time of one call, in milliseconds: of the processor on one thread, of the clock on several."""
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    function()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = clock()
        function()
        best = min(best, clock() - start)
    return best / 1e6


def read_time(num_bytes: int, seconds: float) -> float:
    """Milliseconds of a plain read of ``num_bytes``, on torch's threads."""
    array = torch.ones(num_bytes // 8, dtype=torch.int64)
    return least(array.sum, seconds)


def measure(
    config: ModelConfig, formats: Sequence[WeightFormat], threads: Sequence[int], seconds: float, context: int
) -> None:
    """Prints a table for the instruction set that is loaded."""
    for weights in formats:
        kernel = random_kernel(config, weights)
        for count in threads:
            torch.set_num_threads(count)
            floor = read_time(kernel.num_bytes, seconds)
            found = [least(pass_over(kernel, config, rows, context), seconds) for rows in ROWS]
            cells = "".join(f"{value:8.2f}" for value in found)
            by_rows = dict(zip(ROWS, found, strict=True))
            print(
                f"{instruction_set():18s} {weights:9s} {count:3d} {kernel.num_bytes / 1e6:7.0f} {floor:7.2f}{cells}"
                f"{floor / by_rows[1]:8.2f}{by_rows[6] / by_rows[1]:6.2f}{by_rows[16] / by_rows[1]:6.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", nargs="+", choices=WEIGHT_FORMATS, default=list(WEIGHT_FORMATS))
    parser.add_argument("--isa", nargs="+", default=["native"], help="values of EDA_CPU_ISA [native]")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure [1]")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache [64]")
    for name, value in (
        ("layers", 30),
        ("hidden", 576),
        ("heads", 9),
        ("kv-heads", 3),
        ("head-dim", 64),
        ("intermediate", 1536),
        ("vocab", 49152),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    columns = "".join(f"{f'{rows} rows':>8s}" for rows in ROWS)
    print(f"{'ms a pass':18s} {'weights':9s} thr      MB   floor{columns}  floor/1   6/1  16/1")
    for isa in arguments.isa:
        os.environ["EDA_CPU_ISA"] = isa
        kernels.cache_clear()
        measure(shape(arguments), arguments.weights, arguments.threads, arguments.seconds, arguments.context)


if __name__ == "__main__":
    main()
