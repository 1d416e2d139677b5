"""What a pass over 1, 6 and 16 tokens costs, ours in each weight format beside llama.cpp's, in turns.

    python -m benchmarks.passes --shape smollm2-135m --threads 2 --json passes.json

Both read random weights of one shape and have a cache of ``--context`` tokens; the new tokens are a chain behind it,
and an answer is wanted on each of them, as in verifying a draft. Ours is the likeliest token, llama.cpp's the logits.
A figure is the median of all passes; the floor is the time of a plain read of as many bytes as the weights take.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.peers.interface import MissingPeerError, first_line
from benchmarks.peers.llama_context import LlamaContext, build_report
from benchmarks.peers.quantised_gguf import FILE_TYPES, quantise, tensor_types
from benchmarks.peers.random_gguf import write_random_gguf
from benchmarks.products import pass_over, random_kernel, read_time, shape
from eda.backends.cpu.library import instruction_set
from eda.backends.cpu.weights import WEIGHT_FORMATS
from eda.formats.config import ModelConfig

ROWS = (1, 6, 16)
SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "layers": 30,
        "hidden": 576,
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "intermediate": 1536,
        "vocab": 49152,
    },
    "qwen2.5-1.5b": {
        "layers": 28,
        "hidden": 1536,
        "heads": 12,
        "kv_heads": 2,
        "head_dim": 128,
        "intermediate": 8960,
        "vocab": 151936,
    },
}
"""Sizes alone: both are run as a Llama without biases, on either side."""
LLAMA_CPP_KINDS = ("BF16", *FILE_TYPES)
_PAUSE = 0.05
"""Seconds before each turn, in which the threads of whoever ran before go to sleep."""


@dataclass(slots=True)
class PassContestant:
    """Someone whose passes are timed. ``passes`` holds one function for each entry of ``ROWS``."""

    name: str
    num_bytes: int
    passes: Sequence[Callable[[], object]]
    floor_ms: float | None = None
    detail: dict[str, int] = field(default_factory=dict)
    milliseconds: list[list[float]] = field(default_factory=lambda: [[] for _ in ROWS])

    def as_json(self) -> dict[str, Any]:
        """Medians and least times by rows, in milliseconds."""
        medians = [statistics.median(times) for times in self.milliseconds]
        return {
            "name": self.name,
            "megabytes": self.num_bytes / 1e6,
            "floor_ms": self.floor_ms,
            "median_ms": medians,
            "least_ms": [min(times) for times in self.milliseconds],
            "num_passes": [len(times) for times in self.milliseconds],
            "ratio_to_one_row": [median / medians[0] for median in medians],
            "share_of_floor": None if self.floor_ms is None else self.floor_ms / medians[0],
            "tensors": self.detail,
        }


def own_contestant(config: ModelConfig, weights: Any, context: int) -> PassContestant:
    """This engine's target in one weight format."""
    kernel = random_kernel(config, weights)
    passes = [pass_over(kernel, config, rows, context) for rows in ROWS]
    return PassContestant(f"ours {weights}", kernel.num_bytes, passes)


def llama_cpp_contestant(
    config: ModelConfig, work: Path, kind: str, context: int, threads: int
) -> PassContestant:
    """llama.cpp on the same shape. Raises ``MissingPeerError``."""
    path = write_random_gguf(config, work / "bf16.gguf")
    if kind != "BF16":
        path = quantise(path, work / f"{kind.lower()}.gguf", kind, threads)
    llama = LlamaContext(path, threads=threads, max_length=context + max(ROWS) + 64)
    llama.read([[1 + index % 100 for index in range(context)]])

    def pass_of(rows: int) -> Callable[[], object]:
        def run() -> None:
            llama.forget(context)
            llama.prepare(range(1, rows + 1), range(context, context + rows), [0] * rows, [True] * rows)
            llama.run()

        return run

    passes = [pass_of(rows) for rows in ROWS]
    return PassContestant(f"llama.cpp {kind.lower()}", llama.num_bytes, passes, detail=tensor_types(path))


def time_in_turns(
    contestants: Sequence[PassContestant], *, turns: int, seconds: float, deadline: float
) -> int:
    """Every contestant's passes for ``seconds`` by number of rows, ``turns`` times; whoever begins changes.

    The first pass of each burst wakes the threads and is not counted. Gives the number of whole turns, at least one:
    none begins after ``deadline`` (of ``time.monotonic``).
    """
    for turn in range(turns):
        if turn and time.monotonic() > deadline:
            return turn
        begin = turn % len(contestants)
        for contestant in [*contestants[begin:], *contestants[:begin]]:
            for function, found in zip(contestant.passes, contestant.milliseconds, strict=True):
                time.sleep(_PAUSE)
                function()
                found += _burst(function, seconds)
    return turns


def _burst(function: Callable[[], object], seconds: float) -> list[float]:
    end, found = time.perf_counter() + seconds, []
    while not found or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def pass_table(rows: Sequence[dict[str, Any]]) -> str:
    """Contestants as text, from ``PassContestant.as_json``."""
    lines = [
        "",
        f"{'':20}{'MB':>7}{'floor':>8}"
        + "".join(f"{f'{n} rows':>9}" for n in ROWS)
        + "   floor/1  6/1   16/1",
    ]
    for row in rows:
        floor = "-" if row["floor_ms"] is None else f"{row['floor_ms']:.2f}"
        share = "-" if row["share_of_floor"] is None else f"{row['share_of_floor']:.2f}"
        lines.append(
            f"{row['name']:20}{row['megabytes']:7.0f}{floor:>8}"
            + "".join(f"{value:9.2f}" for value in row["median_ms"])
            + f"{share:>10}"
            + "".join(f"{value:6.2f}" for value in row["ratio_to_one_row"][1:])
        )
    return "\n".join(lines)


def build(options: argparse.Namespace, config: ModelConfig) -> tuple[list[PassContestant], dict[str, str]]:
    """Everyone who can take part, and the reasons of the others."""
    contestants = [own_contestant(config, weights, options.context) for weights in options.weights]
    missing: dict[str, str] = {}
    work = options.work / options.shape
    work.mkdir(parents=True, exist_ok=True)
    for kind in options.kinds:
        try:
            contestants.append(
                llama_cpp_contestant(config, work, kind, options.context, torch.get_num_threads())
            )
        except MissingPeerError as error:
            missing[f"llama.cpp {kind.lower()}"] = str(error)
        except Exception as error:  # whatever a peer's library raises, the others shall still be measured
            missing[f"llama.cpp {kind.lower()}"] = f"could not be set up: {first_line(error)}"
    return contestants, missing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2-135m")
    add("--layers", type=int, help="fewer layers than the shape has, for a trial")
    add("--weights", nargs="*", choices=WEIGHT_FORMATS, default=list(WEIGHT_FORMATS))
    add("--kinds", nargs="*", choices=LLAMA_CPP_KINDS, default=list(LLAMA_CPP_KINDS), help="of llama.cpp")
    add("--threads", type=int, default=0, help="CPU threads of every contestant [torch's choice]")
    add("--context", type=int, default=64, help="tokens in the cache [64]")
    add("--turns", type=int, default=8)
    add("--seconds", type=float, default=0.3, help="of each burst of passes [0.3]")
    add("--minutes", type=float, default=10.0, help="no turn begins after so long a time of turns [10]")
    add("--work", type=Path, default=Path("build/passes"), help="GGUF files, reused [build/passes]")
    add("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = SHAPES[options.shape] | ({"layers": options.layers} if options.layers else {})
    if options.layers:
        options.work = options.work / f"{options.layers}-layers"
    config = shape(argparse.Namespace(**sizes))
    contestants, missing = build(options, config)
    settings = {
        "command": machine.command("benchmarks.passes", arguments),
        "shape": {"name": options.shape, **sizes},
        "threads": torch.get_num_threads(),
        "context": options.context,
        "rows": ROWS,
        "instruction_set": instruction_set(),
        "machine": machine.description(),
        "load_average_before": machine.load_average(),
    }
    if any(contestant.name.startswith("llama.cpp") for contestant in contestants):
        settings["llama_cpp"] = build_report()
    machine.print_settings(settings)
    for contestant in contestants:
        contestant.floor_ms = read_time(contestant.num_bytes, options.seconds * 2)
    deadline = time.monotonic() + 60 * options.minutes
    settings["turns"] = time_in_turns(
        contestants, turns=options.turns, seconds=options.seconds, deadline=deadline
    )
    settings["load_average_after"] = machine.load_average()
    rows = [contestant.as_json() for contestant in contestants]
    print(pass_table(rows))
    print(f"{settings['turns']} turns, load average {settings['load_average_after']} at the end")
    for name, reason in missing.items():
        print(f"missing from this comparison: {name} ({reason})")
    if options.json is not None:
        document = {"kind": "passes", "settings": settings, "missing": missing, "rows": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
