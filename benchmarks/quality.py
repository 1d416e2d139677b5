"""What rounding weights costs: perplexity on held-out text, ours in each format beside llama.cpp's, on the same tokens.

    python -m benchmarks.quality --target model.gguf --data held-out.jsonl --threads 2 --json quality.json

The texts (``response``, ``text`` or ``prompt`` of each line) follow one another in one stream of tokens, an end token
between them, of which the first ``--tokens`` are read in windows of ``--window`` that begin anew. All contestants read
the same windows. "/ bfloat16" is the ratio of perplexities to ours in bfloat16, with its standard error over windows:
differences of the same windows, so that it is far smaller than that of the perplexity itself.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks import machine
from benchmarks.own_engine import OWN_VALUES, load_as
from benchmarks.peers.interface import PeerModel, first_line
from benchmarks.peers.llama_context import LlamaContext, build_report
from benchmarks.peers.llama_cpp_peer import THE_FILE, gguf_of
from benchmarks.peers.plain_checkpoint import write_plain_from_gguf
from benchmarks.peers.quantised_gguf import tensor_types
from eda.backends.cpu.library import instruction_set
from eda.models.answers import Logits
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.target import TargetModel

REFERENCE = "ours bfloat16"
KINDS = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
ReadWindow = Callable[[list[int]], Tensor]
"""Float ``[len(window), vocab_size]``: the logits behind every token of a window."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One contestant's perplexity. ``relative`` is the ratio to ``REFERENCE``; ``error`` its standard error."""

    name: str
    perplexity: float
    relative: float | None
    error: float | None
    seconds: float


def token_stream(data: Path, tokenizer: Any, count: int) -> list[int]:
    """The first ``count`` tokens of the texts in a JSON lines file. Raises ``ValueError`` when there are fewer."""
    end, ids = tokenizer.eos_token_id, list[int]()
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            text = entry.get("response") or entry.get("text") or entry["prompt"]
            ids += [*tokenizer.encode(text, add_special_tokens=False), *([] if end is None else [end])]
            if len(ids) >= count:
                return ids[:count]
    raise ValueError(f"--tokens is {count}, but {data} has only {len(ids)} tokens")


def windows(ids: Sequence[int], size: int) -> list[list[int]]:
    """Whole windows of ``size`` tokens; what is left over is not read."""
    return [list(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]


def loss(logits: Tensor, window: Sequence[int]) -> float:
    """Mean negative log-likelihood of a window's tokens behind the first, in nats."""
    return float(
        torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(window[1:], dtype=torch.int64))
    )


def own_reader(model: TargetModel, size: int) -> ReadWindow:
    """This engine's passes: a window in one pass."""
    cache = model.new_cache(size)
    places = torch.arange(size)
    batch = PackedBatch(places, places, [AttentionRow(0, size, 0, size)])

    def read(window: list[int]) -> Tensor:
        answer = model(torch.tensor(window), batch, cache, wanted=range(size)).answer
        assert isinstance(answer, Logits)
        return answer.values

    return read


def transformers_reader(plain: Path) -> ReadWindow:
    """transformers in float32: what the values of the checkpoint are worth."""
    model: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()

    def read(window: list[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(torch.tensor([window])).logits[0]
        return logits

    return read


def llama_cpp_reader(path: Path, size: int, threads: int) -> ReadWindow:
    """llama.cpp's batches. Raises ``MissingPeerError``."""
    llama = LlamaContext(path, threads=threads, max_length=size)

    def read(window: list[int]) -> Tensor:
        llama.forget()
        parts = []
        for start in range(0, size, llama.max_batch):
            part = window[start : start + llama.max_batch]
            count = len(part)
            llama.prepare(part, range(start, start + count), [0] * count, [True] * count)
            llama.run()
            parts.append(torch.from_numpy(llama.logits(count).copy()))
        return torch.cat(parts)

    return read


def measure(read: ReadWindow, parts: Sequence[list[int]]) -> tuple[list[float], float]:
    """The loss of each window, and the seconds that all took."""
    start = time.perf_counter()
    losses = [loss(read(part), part) for part in parts]
    return losses, time.perf_counter() - start


def qualities(losses: dict[str, list[float]], seconds: dict[str, float]) -> list[Quality]:
    """Perplexities, and their ratios to the reference where it was measured."""
    found = []
    reference = losses.get(REFERENCE)
    for name, values in losses.items():
        relative = error = None
        if reference is not None:
            differences = [one - other for one, other in zip(values, reference, strict=True)]
            relative = math.exp(statistics.fmean(differences))
            if len(differences) > 1:
                error = relative * statistics.stdev(differences) / math.sqrt(len(differences))
        found.append(Quality(name, math.exp(statistics.fmean(values)), relative, error, seconds[name]))
    return found


def readers(
    plain: Path, file: Path | None, work: Path, size: int, only: Sequence[str]
) -> Iterator[tuple[str, Callable[[], ReadWindow]]]:
    """Names and makers of everyone, one of which is to be alive at a time."""
    threads = torch.get_num_threads()
    model = PeerModel(plain, work, torch.bfloat16, threads, size)

    def own(path: Path, weights: str) -> Callable[[], ReadWindow]:
        return lambda: own_reader(load_as(path, weights), size)

    def peer(kind: str) -> Callable[[], ReadWindow]:
        return lambda: llama_cpp_reader(gguf_of(model, kind), size, threads)

    everyone: list[tuple[str, Callable[[], ReadWindow]]] = [
        *((f"ours {weights}", own(plain, weights)) for weights in ("bfloat16", "int8", "int4")),
        *([] if file is None else [(f"ours {OWN_VALUES}", own(file, OWN_VALUES))]),
        ("transformers float32", lambda: transformers_reader(plain)),
        *((f"llama.cpp {kind.lower()}", peer(kind)) for kind in KINDS),
    ]
    if file is not None:
        path = file
        everyone.append((THE_FILE, lambda: llama_cpp_reader(path, size, threads)))
    yield from ((name, make) for name, make in everyone if not only or any(part in name for part in only))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", type=Path, required=True, help="a GGUF file or a directory")
    add("--data", type=Path, required=True, help="JSON lines with held-out texts")
    add("--tokens", type=int, default=16384, help="read from the beginning of the data [16384]")
    add("--window", type=int, default=512, help="tokens that are read at once [512]")
    add("--threads", type=int, default=0, help="CPU threads of every contestant [torch's choice]")
    add("--only", default="", help="contestants whose name contains one of these, separated by commas [all]")
    add("--minutes", type=float, default=15.0, help="no contestant begins after that [15]")
    add("--work", type=Path, default=Path("build/peers"), help="converted weights, reused [build/peers]")
    add("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    file = options.target if options.target.is_file() else None
    work = options.work / f"target-{options.target.stem}"
    work.mkdir(parents=True, exist_ok=True)
    plain = options.target if file is None else write_plain_from_gguf(file, work / "plain")
    ids = token_stream(options.data, AutoTokenizer.from_pretrained(plain), options.tokens)
    parts = windows(ids, options.window)
    settings: dict[str, Any] = {
        "command": machine.command("benchmarks.quality", arguments),
        "target": options.target.name,
        "data": options.data.name,
        "tokens": len(parts) * options.window,
        "window": options.window,
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "machine": machine.description(),
        "load_average_before": machine.load_average(),
    }
    machine.print_settings(settings)
    deadline = time.monotonic() + 60 * options.minutes
    losses: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, make in readers(plain, file, work, options.window, [p for p in options.only.split(",") if p]):
        if losses and time.monotonic() > deadline:
            missing[name] = f"was not begun within {options.minutes:g} minutes"
            continue
        try:
            losses[name], seconds[name] = measure(make(), parts)
        except Exception as error:  # whatever is wrong with one, the others shall still be measured
            missing[name] = first_line(error)
            continue
        print(f"{name}: perplexity {math.exp(statistics.fmean(losses[name])):.4f}", flush=True)
    found = qualities(losses, seconds)
    if any(name.startswith("llama.cpp") for name in losses):
        files = {path.stem: tensor_types(path) for path in sorted(work.glob("*.gguf"))}
        settings["llama_cpp"] = build_report() | {"tensors": files}
    settings["load_average_after"] = machine.load_average()
    print(table(found))
    for name, reason in missing.items():
        print(f"missing from this comparison: {name} ({reason})")
    if options.json is not None:
        document = {
            "kind": "quality",
            "settings": settings,
            "missing": missing,
            "rows": [asdict(quality) for quality in found],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if any(name.startswith("ours") for name in missing) else 0


def table(found: Sequence[Quality]) -> str:
    """Perplexities as text."""
    lines = ["", f"{'':24}{'perplexity':>11}{'/ bfloat16':>18}"]
    for quality in found:
        relative = "-" if quality.relative is None else f"{quality.relative - 1:+.3%}"
        error = "" if quality.error is None else f" +- {quality.error:.3%}"
        lines.append(f"{quality.name:24}{quality.perplexity:11.4f}{relative + error:>20}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
