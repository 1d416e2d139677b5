"""Speed on a CUDA device: passes of a target of real size, rounds of its draft, and a trained family's acceptance.

    python -m benchmarks.gpu --json gpu.json

1. Copy bandwidth of the device's memory, and single passes of a target with random weights of an 8B Llama's shape: how
   much of the limit is reached that reading all weights once sets. Each pass is timed operation by operation and as the
   engine replays it as a CUDA graph (`--no-graphs` leaves that out).
2. Decoding with the engine on those weights, with CUDA graphs and without: seconds of a plain round, and of rounds that
   draft with the shared draft alone and with a private module (both untrained, which costs what trained ones cost).
3. The bundled family, trained: tokens per round and tokens/s with no draft, the shared draft and private modules.

The last figure puts 2 and 3 together: what the family's acceptance would give at the large target's cost per round. It
is a projection and named so. Exits with 2 where there is no CUDA device. `--device cpu --tiny` runs every line of this
on a few hundred kilobytes of weights, with functions that are called again for graphs; its figures mean nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.compare import DOMAINS, load_family
from benchmarks.comparison_report import Row, means_over_domains, rows_of, table
from benchmarks.comparison_turns import run_in_turns
from benchmarks.gpu_passes import (
    PassTiming,
    copy_bandwidth,
    llama_config,
    random_target,
    synchronise,
    time_pass,
)
from benchmarks.own_engine import KINDS, Family, OwnEngine, own_contestants, own_name
from benchmarks.peers.interface import Prompt
from benchmarks.prompts import read_prompts
from eda.backends.choice import GraphChoice
from eda.backends.recorded.replay import CudaGraphBackend, GraphCache, Recorder, RerunBackend
from eda.decoder import SpeculativeDecoder
from eda.models.draft import DraftConfig, DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.models.target import TargetModel, default_tap_layers
from eda.server.bundled_prompts import PROMPTS_DIRECTORY
from eda.server.engine.speculation import SpeculationTable
from eda.server.model_paths import model_paths
from eda.server.settings import ConfigurationError, load_settings
from eda.speculation.kinds import Off

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "max_position_embeddings": 8192,
    },
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 512,
    },
}
DRAFT_VOCABULARY = 32_000
PASSES = ((1, 1), (1, 2), (1, 4), (1, 8), (1, 17), (4, 1), (16, 1), (16, 3))
"""(sequences, tokens of each): decoding, chains and trees of a lone sequence, and batches."""


def untrained_draft(target: TargetModel) -> DraftModel:
    """A draft of the target's shape; its proposals are worthless and cost what good ones cost."""
    config = target.config
    size = min(DRAFT_VOCABULARY, config.vocab_size // 2)
    taps = default_tap_layers(config.num_layers)
    draft_config = DraftConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tap_layers=taps,
        vocab_size=config.vocab_size,
        draft_vocab_size=size,
        max_position_embeddings=config.max_position_embeddings,
    )
    draft = DraftModel.initialised(draft_config, torch.arange(size))
    return draft.to(device=target.device, dtype=target.dtype)


def untrained_private(draft: DraftModel) -> PrivateModule:
    """A private module of the sizes that training takes by itself."""
    rank = draft.config.hidden_size // 8
    sizes = draft.config.private_config(draft.config.intermediate_size // 4, rank, rank)
    module = PrivateModule.initialised(sizes)
    return module.to(device=draft.fc.weight.device, dtype=draft.fc.weight.dtype).requires_grad_(False)


def graph_backend(device: torch.device) -> Recorder:
    """CUDA graphs; on the CPU functions that are called again, which saves nothing."""
    return CudaGraphBackend(device) if device.type == "cuda" else RerunBackend()


def measure_passes(
    target: TargetModel, *, bandwidth: float, context: int, repeats: int, graphs: bool
) -> tuple[list[PassTiming], str | None]:
    """All of ``PASSES``, and why graphs are missing where they were asked for."""
    backend = graph_backend(target.device) if graphs else None
    timings, reason = [], None
    for batch, tokens in PASSES:
        timing, refused = time_pass(
            target,
            batch=batch,
            tokens=tokens,
            context=context,
            bandwidth=bandwidth,
            repeats=repeats,
            backend=backend if reason is None else None,
        )
        reason = reason or refused
        timings.append(timing)
    return timings, reason


def seconds_per_round(
    target: TargetModel,
    draft: DraftModel,
    private: PrivateModule,
    *,
    prompt: int,
    rounds: int,
    graphs: bool,
) -> dict[str, float]:
    """Seconds of the engine's rounds for a lone sequence: without a draft, with the shared one, with a private module.

    The prompt's pass is not in them, nor is the recording of graphs.
    """
    family = Family(target, draft, {"large": FineTune("large", target)}, {"large": private})
    speculation = SpeculationTable.default().levels[0].speculation()
    results = {}
    for kind in KINDS:
        shape = Off() if kind == "none" else speculation
        choice = GraphCache(graph_backend(target.device), capture_after=1) if graphs else "off"
        # Every round can accept a whole draft, and those are the tokens that its slots are for.
        longest = prompt + (4 + rounds) * (shape.num_nodes + 1) + shape.slots
        decoder = SpeculativeDecoder.for_models(target, draft, num_slots=longest, graphs=choice)
        engine = OwnEngine(decoder, family, kind, shape, 1)
        prompts = [Prompt("large", [index % target.config.vocab_size for index in range(prompt)])]

        def timed(
            count: int, engine: OwnEngine = engine, prompts: list[Prompt] = prompts
        ) -> tuple[float, int]:
            synchronise(target.device)
            start = time.perf_counter()
            [completion] = engine(prompts, count)
            synchronise(target.device)
            return time.perf_counter() - start, completion.num_rounds or 0

        timed(4)
        timed(4 + rounds)  # everything that is recorded on the way is recorded now
        short, long = timed(4), timed(4 + rounds)
        results[kind] = (long[0] - short[0]) / max(1, long[1] - short[1])
    return results


def round_table(rounds: dict[str, dict[str, float]], limit: float) -> str:
    """Seconds per round as text, ``rounds`` by graphs and kind."""
    lines = [f"{'rounds, ms':>14}{'plain':>10}{'of limit':>10}{'shared':>10}{'private':>10}"]
    for name, by_kind in rounds.items():
        plain, shared, private = (by_kind[kind] for kind in KINDS)
        lines.append(
            f"{name:>14}{plain * 1e3:10.2f}{limit / plain:10.2f}{shared * 1e3:10.2f}{private * 1e3:10.2f}"
        )
    return "\n".join(lines)


def measure_family(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """The trained family on ``device``. Raises ``ConfigurationError`` where there is none."""
    paths = model_paths(load_settings(None, {"models_dir": options.models}))
    domains = [domain for domain in DOMAINS if domain in paths.fine_tunes]
    family = load_family(paths, domains, options.weights, device.type)
    tokenizer = AutoTokenizer.from_pretrained(paths.target)
    rows: list[Row] = []
    for domain in domains:
        prompts = read_prompts(options.prompts, domain, options.num_prompts, tokenizer)
        length = max(len(prompt.token_ids) for prompt in prompts) + options.tokens + 64
        graphs: GraphChoice = "auto" if options.graphs else "off"
        decoder = SpeculativeDecoder.for_models(
            family.target, family.draft, num_slots=length * 16, graphs=graphs
        )
        contestants = own_contestants(decoder, family, [domain], (1, 16), SpeculationTable.default())
        records, failed = run_in_turns(contestants, prompts, options.tokens)
        for name, reason in failed.items():
            print(f"missing from this comparison: {name} ({domain}: {reason})")
        rows += rows_of(domain, records)
    return rows


def pass_table(timings: Sequence[PassTiming]) -> str:
    """The passes as text."""
    lines = [
        f"{'sequences x tokens':>20}{'limit ms':>10}{'pass ms':>10}{'of limit':>10}{'graph ms':>10}{'of limit':>10}"
    ]
    for timing in timings:
        graph = "-" if timing.replayed is None else f"{timing.replayed * 1e3:.2f}"
        share = timing.replayed_share_of_limit
        lines.append(
            f"{f'{timing.batch} x {timing.tokens}':>20}{timing.limit * 1e3:10.2f}{timing.seconds * 1e3:10.2f}"
            f"{timing.share_of_limit:10.2f}{graph:>10}{'-' if share is None else f'{share:.2f}':>10}"
        )
    return "\n".join(lines)


def projected_speedups(rows: Sequence[Row], rounds: dict[str, float]) -> dict[str, float]:
    """How much faster than plain the large target would be with the family's tokens per round."""
    return {
        kind: row.tokens_per_round * rounds["none"] / rounds[kind]
        for row in means_over_domains(rows)
        for kind in ("shared", "private")
        if row.name == own_name(kind, 1) and row.tokens_per_round is not None
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:<number>, or cpu to try the script out [cuda]")
    add("--shape", default="8b", choices=[name for name in SHAPES if name != "tiny"])
    add("--tiny", action="store_true", help="a target of a few hundred kilobytes, to try the script out")
    add("--weights", default="auto", choices=("auto", "bfloat16", "float32"), help="[bfloat16 on CUDA]")
    add("--context", type=int, default=512, help="cached tokens of each sequence in a timed pass [512]")
    add("--rounds", type=int, default=64, help="rounds of the engine that are timed [64]")
    add("--repeats", type=int, default=20, help="measurements of each pass; the median counts [20]")
    add("--graphs", action=argparse.BooleanOptionalAction, default=True, help="replay CUDA graphs too [on]")
    add("--models", type=Path, help="trained family for acceptance [the bundled one]")
    add("--prompts", type=Path, default=PROMPTS_DIRECTORY)
    add("--num-prompts", type=int, default=8, help="prompts of each domain [8]")
    add("--tokens", type=int, default=256, help="tokens generated for each prompt [256]")
    add("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        print(
            f"benchmarks.gpu: no CUDA device {device.index or 0} here, so nothing was measured. "
            "`--device cpu --tiny` tries the script out without one",
            file=sys.stderr,
        )
        return 2
    if device.type != "cuda" and not options.tiny:
        print("benchmarks.gpu: without a CUDA device only --tiny is run", file=sys.stderr)
        return 2
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    on_gpu = device.type == "cuda"
    print(
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
        if on_gpu
        else "no GPU: a trial run, none of these figures means anything"
    )
    if options.weights == "auto":
        dtype = torch.bfloat16 if on_gpu else torch.float32
    else:
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.weights]
    shape = "tiny" if options.tiny else options.shape

    bandwidth = copy_bandwidth(device, 2**30 if on_gpu else 2**22, options.repeats)
    print(f"copy bandwidth: {bandwidth / 1e9:.0f} GB/s read and written")
    target = random_target(llama_config(**SHAPES[shape], dtype=dtype), device)
    graphs = options.graphs
    timings, reason = measure_passes(
        target, bandwidth=bandwidth, context=options.context, repeats=options.repeats, graphs=graphs
    )
    print(
        f"\npasses of a random {shape} Llama in {str(dtype).removeprefix('torch.')}, context {options.context}"
    )
    print(pass_table(timings))
    if not graphs:
        reason = "switched off"
    if reason is not None:
        print(f"no CUDA graphs: {reason}")
    elif not on_gpu:
        print(
            "no CUDA graphs: this is no CUDA device, the graph columns are functions that were called again"
        )

    draft = untrained_draft(target)
    private = untrained_private(draft)
    rounds = {
        name: seconds_per_round(
            target, draft, private, prompt=32, rounds=options.rounds, graphs=name == "graphs on"
        )
        for name in (("graphs off", "graphs on") if graphs and reason is None else ("graphs off",))
    }
    print("\nrounds of the engine, lone sequence")
    print(round_table(rounds, timings[0].limit))
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "none, a trial run",
        "shape": shape,
        "dtype": str(dtype),
        "copy_bandwidth": bandwidth,
        "passes": [asdict(timing) for timing in timings],
        "no_graphs": reason,
        "seconds_per_round": rounds,
    }
    try:
        rows = measure_family(options, device)
    except ConfigurationError as error:
        print(f"\nno acceptance measured: {error}")
    else:
        print(table("trained family, mean over domains", means_over_domains(rows)))
        projected = projected_speedups(rows, rounds.get("graphs on", rounds["graphs off"]))
        for kind, factor in projected.items():
            print(f"projected, {kind} / plain at the {shape} target's cost per round: {factor:.2f}x")
        document |= {"family": [row.as_json() for row in rows], "projected": projected}
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
